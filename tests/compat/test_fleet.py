"""Who gets the next request, who is checked, who is forgotten: histories replayed on a clock of our own."""

from __future__ import annotations

import pytest

from mdeploy.compat import address, fleet


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def joined(clock: Clock, count: int = 2) -> tuple[fleet.Fleet, list[fleet.Worker]]:
    workers = fleet.Fleet(clock)
    found = [workers.heard(f"http://w{n}:1", "m") for n in range(count)]
    for worker in found:
        workers.checked(worker, is_healthy=True)
    return workers, found


def test_a_new_worker_serves_once_it_was_checked(clock: Clock) -> None:
    workers = fleet.Fleet(clock)
    worker = workers.heard("http://w:1", "m")
    assert workers.pick("m") is None
    assert workers.due() == (worker,)
    workers.checked(worker, is_healthy=True)
    assert workers.pick("m") is worker
    assert workers.pick("other") is None
    assert workers.due() == ()


def test_the_least_busy_worker_goes_first_and_equals_take_turns(clock: Clock) -> None:
    workers, (one, two) = joined(clock)
    assert [workers.pick("m") for _ in range(4)] == [one, two, one, two]
    one.in_flight = 1
    assert [workers.pick("m") for _ in range(2)] == [two, two]
    assert workers.pick("m", [two]) is one
    assert workers.pick("m", [one, two]) is None


def test_a_failure_is_a_suspicion_and_only_a_failed_check_evicts(clock: Clock) -> None:
    workers, (one, two) = joined(clock)
    workers.failed(one)
    assert workers.due() == (one,)
    assert [workers.pick("m") for _ in range(2)] == [two, two]
    assert workers.pick("m", [two]) is one
    workers.checked(one, is_healthy=False)
    assert workers.pick("m", [two]) is None
    workers.checked(one, is_healthy=True)
    assert workers.pick("m", [two]) is one


def test_a_silent_worker_is_checked_and_a_dead_one_forgotten(clock: Clock) -> None:
    workers, (one, two) = joined(clock)
    clock.now = fleet.SILENT_S + 1
    workers.heard(two.address, "m")
    assert workers.due() == (one,)
    workers.checked(one, is_healthy=False)
    clock.now = fleet.FORGOTTEN_S + 1
    assert workers.due() == (two,)
    assert workers.of("m") == (two,)
    assert workers.heard(one.address, "m") is not one


def test_leaving_and_changing_the_model(clock: Clock) -> None:
    workers, (one, two) = joined(clock)
    workers.left(one.address)
    workers.left(one.address)
    assert workers.of("m") == (two,)
    assert workers.heard(two.address, "n") is not two
    assert workers.of("m") == ()
    assert len(workers) == 1


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("http://localhost:8888", "http://localhost:8888"),
        ("http://10.0.0.5:8880/", "http://10.0.0.5:8880"),
        ("https://Host.example", "https://host.example:443"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_addresses_have_one_spelling(text: str, same: str) -> None:
    assert address.checked(text) == same


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:8888",
        "ftp://h:1",
        "http://",
        "http://h:x",
        "http://h:99999",
        "http://u@h:1",
        "http://h:1/path",
        "http://h:1?x=1",
        "http://h\x00:1",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        address.checked(text)
