"""When an engine that ended is started again, and when not."""

from __future__ import annotations

import pytest

from mdeploy.specs import RestartPolicy
from mdeploy.supervise.policy import Ending, after


def _pauses(policy: RestartPolicy, every_s: float, count: int, ready_s: float | None = 1.0) -> list[float | None]:
    """The answers to `count` failures that come at a regular pace."""
    failures: tuple[float, ...] = ()
    answers: list[float | None] = []
    for number in range(count):
        verdict = after(policy, failures, Ending(number * every_s, ready_s), served=True)
        failures = verdict.failures
        answers.append(verdict.pause_s)
    return answers


def test_pauses_double_and_five_failures_are_enough() -> None:
    assert _pauses("on-failure", 60, 5) == [1, 2, 4, 8, None]


def test_always_never_gives_up_and_never_waits_more_than_a_minute() -> None:
    pauses = _pauses("always", 10, 200)
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert set(pauses[6:]) == {60}


def test_failures_that_are_far_apart_do_not_add_up() -> None:
    assert _pauses("on-failure", 1800, 20) == [1] * 20
    assert None not in _pauses("on-failure", 1800 / 4 + 1, 20)


def test_ten_minutes_in_service_wipe_the_slate() -> None:
    assert _pauses("on-failure", 1, 20, ready_s=600) == [1] * 20
    assert None in _pauses("on-failure", 1, 20, ready_s=599)


def test_never_means_never() -> None:
    assert _pauses("never", 60, 3) == [None] * 3


@pytest.mark.parametrize("policy", ["always", "on-failure", "never"])
def test_a_start_that_fails_is_told_not_repeated(policy: RestartPolicy) -> None:
    assert after(policy, (), Ending(0, None), served=False).pause_s is None


@pytest.mark.parametrize("policy", ["always", "on-failure", "never"])
def test_what_cannot_get_better_is_not_tried_again(policy: RestartPolicy) -> None:
    assert after(policy, (), Ending(0, 5, permanent=True), served=True).pause_s is None


def test_the_reason_for_giving_up_is_told() -> None:
    assert after("on-failure", (1, 2, 3, 4), Ending(5, 1), served=True).why == "5 failures within 30 minutes"


def test_a_clock_that_was_set_back_forgets() -> None:
    assert after("on-failure", (1000, 1001, 1002, 1003), Ending(5, 1), served=True).failures == (5,)
