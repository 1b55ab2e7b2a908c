"""What single requests meet in a served class: errors, limits, deadlines, streams, forms, large bodies."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serving.served import LAB, Service, served
from tests.support import until

CLASSES = ("Small", "Slow", "Events", "Raw", "Parcel", "Odd", "Costly")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Several handlers in one service, one worker each; the tests share the workers, and none may die."""
    with served(tmp_path_factory.mktemp("requests"), *(f"{LAB}:{name}" for name in CLASSES)) as service:
        before = {name: service.pids(name.lower()) for name in CLASSES}
        yield service
        assert {name: service.pids(name.lower()) for name in CLASSES} == before


def test_every_handler_has_its_own_path_and_worker(lab: Service) -> None:
    handlers = lab.health()["handlers"]
    assert set(handlers) == {name.lower() for name in CLASSES}
    assert len({worker["pid"] for h in handlers.values() for worker in h["workers"]}) == len(CLASSES)
    assert {f"/{name.lower()}" for name in CLASSES} <= set(lab.ask("/openapi.json", method="GET").json()["paths"])


def _together(lab: Service, items: list[Any]) -> list[Any]:
    """Ask /small for all of them while its worker is busy, so that they are one batch."""
    gate = lab.lab / "open"

    def known() -> int:
        handler = lab.health()["handlers"]["small"]
        return int(handler["queued"] + handler["in_flight"])

    with ThreadPoolExecutor(len(items) + 1) as threads:
        first = threads.submit(lab.ask, "/small", {"n": "first", "gate": True})
        until(lambda: known() == 1, what="the worker is busy")
        rest = [threads.submit(lab.ask, "/small", item) for item in items]
        until(lambda: known() == len(items) + 1, what="the others wait")
        gate.touch()
        assert first.result().status_code == 200
        gate.unlink()
        return [one.result() for one in rest]


def test_a_batch_that_runs_out_of_memory_is_halved(lab: Service) -> None:
    answers = _together(lab, [{"n": i} for i in range(8)])
    assert [a.json()["n"] for a in answers] == list(range(8))
    sizes = [int(size) for size in lab.noted("sizes")]
    assert max(sizes) > 2
    assert sum(size for size in sizes if size <= 2) >= 9


@pytest.mark.parametrize(
    ("bad", "status", "text"),
    [
        ("preprocess", 400, "it has no shape"),
        ("forward", 500, ""),
        ("postprocess", 409, "it is taken"),
        ("missing", 404, "no such voice"),
    ],
)
def test_a_bad_item_gets_its_status_and_the_others_their_answers(
    lab: Service, bad: str, status: int, text: str
) -> None:
    answers = _together(lab, [{"n": i, "bad": bad if i == 1 else None} for i in range(4)])
    assert [a.status_code for a in answers] == [200, status, 200, 200]
    error = answers[1].json()["error"]
    assert text in error["message"]
    assert "secret" not in answers[1].text
    assert answers[1].headers["x-request-id"]


def test_a_request_that_waits_too_long_is_answered_504_and_never_computed(lab: Service) -> None:
    with ThreadPoolExecutor(3) as threads:
        begun = [threads.submit(lab.ask, "/slow", {"n": f"d{i}", "sleep": 1.0}) for i in range(3)]
    statuses = sorted(future.result().status_code for future in begun)
    assert statuses == [200, 504, 504]
    assert lab.ask("/slow", {"n": "after"}).status_code == 200
    assert len([n for n in lab.noted("slow") if n.startswith("d")]) <= 2


def test_a_full_queue_is_answered_503_with_retry_after(lab: Service) -> None:
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda i: lab.ask("/slow", {"n": f"q{i}", "sleep": 0.2}), range(10)))
    shed = [a for a in answers if a.status_code == 503]
    assert shed
    assert {a.status_code for a in answers} == {200, 503}
    assert int(shed[0].headers["retry-after"]) >= 1
    assert shed[0].json()["error"]["type"]
    assert len([n for n in lab.noted("slow") if n.startswith("q")]) == len(answers) - len(shed)
    assert lab.ask("/health", method="GET").status_code == 200


def test_a_client_that_leaves_while_it_waits_is_never_computed(lab: Service) -> None:
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(lab.ask, "/slow", {"n": "busy", "sleep": 1.0})
        until(lambda: "busy" in lab.noted("slow"))
        leaving = [lab.connect("/slow", {"n": f"gone-{i}"}) for i in range(3)]
        until(lambda: _waiting(lab) >= 3, what="all of them wait")
        for sock in leaving:
            sock.close()
        assert first.result().status_code == 200
    assert lab.ask("/slow", {"n": "last"}).status_code == 200
    assert not [n for n in lab.noted("slow") if n.startswith("gone")]


def _waiting(lab: Service) -> int:
    found = lab.health()["handlers"]["slow"]
    return int(found["queued"]) + int(found["in_flight"]) - 1


def test_events_arrive_one_by_one(lab: Service) -> None:
    with httpx.stream("POST", f"http://127.0.0.1:{lab.port}/events", json={"count": 3, "sleep": 0.3}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers.get_list("cache-control") == ["no-cache"]
        begun, data = time.monotonic(), []
        for line in answer.iter_lines():
            if line.startswith("data:"):
                data.append((json.loads(line[5:])["number"], time.monotonic() - begun))
    assert [number for number, _ in data] == [0, 1, 2]
    assert data[2][1] - data[0][1] > 0.1  # they did not come in one piece


def test_raw_parts_arrive_as_they_are(lab: Service) -> None:
    assert lab.ask("/raw").content == b"".join(bytes([n]) * 1000 for n in range(4))


def test_a_stream_that_fails_ends_with_an_error_event(lab: Service) -> None:
    text = lab.ask("/events", {"count": 5, "fail_at": 2}).text
    assert 'data: {"number":1}' in text.replace('": 1', '":1')
    assert "event: error" in text
    assert "secret" not in text


def test_a_stream_that_fails_at_once_is_a_plain_error(lab: Service) -> None:
    answer = lab.ask("/events", {"count": 5, "fail_at": 0})
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_the_generator_of_a_client_that_left_is_closed(lab: Service) -> None:
    ended = len(lab.noted("streams"))
    with lab.connect("/events", {"sleep": 0.01}) as sock:
        assert sock.recv(100)
    until(lambda: len(lab.noted("streams")) > ended, what="the generator ends")
    assert lab.ask("/events", {"count": 1}).status_code == 200


def test_a_slow_reader_of_a_fast_stream_holds_up_nothing_but_itself(lab: Service) -> None:
    with lab.connect("/events", {}) as sock:
        assert sock.recv(100)
        assert lab.ask("/raw").status_code == 200
    assert lab.ask("/events", {"count": 1}).status_code == 200


@pytest.mark.parametrize("size", [0, 1, 65536, 8 << 20])
def test_bodies_of_any_size_come_back_byte_by_byte(lab: Service, size: int) -> None:
    body = os.urandom(size)
    answer = lab.ask("/parcel", content=body, headers={"Content-Type": "application/x-any"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-any"
    assert answer.content == body


def test_large_bodies_at_once_do_not_mix(lab: Service) -> None:
    bodies = [os.urandom(2 << 20) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda body: lab.ask("/parcel", content=body), bodies))
    assert [a.content for a in answers] == bodies


def test_forms_and_queries_reach_the_class(lab: Service) -> None:
    files = {"image": ("é ü.png", b"x" * 70000, "image/png")}
    got = lab.ask("/parcel", data={"a": "1", "b": "zwei"}, files=files).json()
    assert got == {"form": {"a": "1", "b": "zwei"}, "files": [["image", "é ü.png", "image/png", 70000]]}
    got = lab.ask("/parcel?a=1&b=%C3%A9", method="GET", headers={"X-Agent": "me"}).json()
    assert got == {"query": {"a": "1", "b": "é"}, "agent": "me"}
    assert lab.ask("/parcel", data={"a": "ä&="}).json()["form"] == {"a": "ä&="}


def test_batches_keep_to_their_cost(lab: Service) -> None:
    answers = lab.ask_all("/costly", [{"text": "a" * length} for length in (1, 4, 4, 4, 30, 2)])
    assert [len(a.json()["text"]) for a in answers] == [1, 4, 4, 4, 30, 2]
    costs = [int(cost) for cost in lab.noted("costs")]
    assert 30 in costs
    assert max(cost for cost in costs if cost != 30) <= 10


def test_an_item_whose_cost_cannot_be_told_fails_alone(lab: Service) -> None:
    answers = lab.ask_all("/costly", [{"text": "first"}, {"text": "a"}, {"no": "text"}, {"text": "b"}])
    assert [a.status_code for a in answers] in ([200, 200, 500, 200], [200, 200, 400, 200])


@pytest.mark.parametrize(
    "odd",
    [
        {"status": 99},
        {"status": 101},
        {"status": 1000},
        {"status": "many"},
        {"headers": {"X-A": "a\r\nX-Injected: 1"}},
        {"headers": {"X-A\r\nX-Injected": "1"}},
        {"headers": {"X-A": "汉字"}},
        {"headers": {"": "x"}},
        {"headers": {"Content-Length": "1000"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
        {"media_type": "text/plain\r\nX-Injected: 1"},
        {"value": "set"},
        {"value": "object"},
        {"value": "nan"},
        {"value": "bytes"},
        {"value": "none"},
    ],
)
def test_an_answer_without_sense_breaks_neither_connection_nor_worker(lab: Service, odd: dict[str, Any]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{lab.port}", trust_env=False, timeout=20) as client:
        answer = client.post("/odd", json=odd)
        assert answer.status_code in (200, 500)
        assert "x-injected" not in answer.headers
        assert client.post("/odd", json={"body": "after"}).text == "after"


@pytest.mark.parametrize("status", [204, 205, 304])
def test_an_answer_that_may_have_no_body_has_none(lab: Service, status: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{lab.port}", trust_env=False, timeout=20) as client:
        answer = client.post("/odd", json={"status": status, "body": "smuggled"})
        assert answer.status_code in (status, 500)
        assert status == 205 or "smuggled" not in answer.text
        assert client.post("/odd", json={"body": "after"}).text == "after"


def test_a_method_the_class_does_not_take_is_405(lab: Service) -> None:
    answer = lab.ask("/slow", method="DELETE")
    assert answer.status_code == 405
    assert {m.strip() for m in answer.headers["allow"].split(",")} >= {"GET", "POST"}
    assert lab.ask("/nothing-here").status_code == 404
