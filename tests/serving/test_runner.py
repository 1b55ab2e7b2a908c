"""A batch through a handler: what goes wrong with one item stays with that item."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mdeploy.serving import answers, load
from mdeploy.serving.handler import Handler, HTTPError, Request, Response
from mdeploy.serving.info import Reply
from mdeploy.serving.runner import Answered, Chunk, Closed, Event, Runner


def requests(*values: Any) -> list[Request]:
    return [Request(body=json.dumps(value).encode()) for value in values]


def runner(cls: type[Handler]) -> Runner:
    return Runner(cls(), load.describe(cls))


def run(cls: type[Handler], *values: Any, gone: Callable[[int], bool] = lambda index: False) -> dict[int, Reply]:
    events = runner(cls).run(requests(*values), gone)
    return {index: reply for event in events if isinstance(event, Answered) for index, reply in event.replies}


def values(replies: dict[int, Reply]) -> dict[int, Any]:
    return {i: json.loads(bytes(r.body)) if r.status == 200 else (r.status, r.code) for i, r in sorted(replies.items())}


class Recorder(Handler):
    """Doubles numbers, and remembers the batches it got."""

    max_batch_size = 8
    batches: list[list[Any]]

    def preprocess(self, request: Request) -> Any:
        value = request.json()
        if value == "bad":
            raise ValueError("bad is not good")
        return value

    def forward(self, batch: list[Any]) -> Sequence[Any]:
        type(self).batches.append(batch)
        return [item * 2 for item in batch]


@pytest.fixture(autouse=True)
def no_batches() -> None:
    Recorder.batches = []


def test_a_batch_is_one_forward_in_order() -> None:
    assert values(run(Recorder, 1, 2, 3)) == {0: 2, 1: 4, 2: 6}
    assert Recorder.batches == [[1, 2, 3]]


def test_an_item_that_preprocess_refuses_fails_alone() -> None:
    assert values(run(Recorder, 1, "bad", 3)) == {0: 2, 1: (400, "bad_request"), 2: 6}
    assert Recorder.batches == [[1, 3]]


def test_a_body_that_is_no_json_fails_alone() -> None:
    events = runner(Recorder).run([Request(body=b"{"), Request(body=b"NaN"), *requests(4)])
    replies = {i: r for e in events if isinstance(e, Answered) for i, r in e.replies}
    assert [replies[i].status for i in range(3)] == [400, 400, 200]


def test_an_item_that_breaks_forward_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    class Breaks(Recorder):
        def forward(self, batch: list[Any]) -> Sequence[Any]:
            return [10 // item for item in super().forward(batch)]

    assert values(run(Breaks, 1, 0, 5)) == {0: 5, 1: (500, "internal_error"), 2: 1}
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_exception_in_place_of_an_output_is_that_items() -> None:
    class Picky(Recorder):
        def forward(self, batch: list[Any]) -> Sequence[Any]:
            return [HTTPError(404, "no two") if item == 2 else item for item in batch]

    replies = run(Picky, 1, 2, 3)
    assert values(replies) == {0: 1, 1: (404, "not_found"), 2: 3}
    assert replies[1].message == "no two"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_halves_the_batch(error: Exception) -> None:
    class Small(Recorder):
        def forward(self, batch: list[Any]) -> Sequence[Any]:
            done = super().forward(batch)
            if len(batch) > 2:
                raise error
            return done

    assert values(run(Small, *range(5))) == {i: i * 2 for i in range(5)}
    assert [len(batch) for batch in Recorder.batches] == [5, 3, 2, 1, 2]


def test_one_item_alone_too_large_for_the_device_says_so() -> None:
    class Never(Recorder):
        def forward(self, batch: list[Any]) -> Sequence[Any]:
            raise MemoryError

    assert values(run(Never, 1, 2)) == {0: (500, "out_of_memory"), 1: (500, "out_of_memory")}


@pytest.mark.parametrize("outputs", [[1], None, 7])
def test_a_forward_that_returns_something_else(outputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Recorder):
        def forward(self, batch: list[Any]) -> Sequence[Any]:
            return outputs if len(batch) != 1 else []

    assert values(run(Odd, 1, 2)) == {0: (500, "internal_error"), 1: (500, "internal_error")}
    assert "forward returned" in capsys.readouterr().err


def test_batches_by_cost() -> None:
    class Costly(Recorder):
        max_batch_cost = 10

        def cost(self, item: Any) -> float:
            return float(item)

    assert values(run(Costly, 4, 5, 6, 20, 1, 9)) == {0: 8, 1: 10, 2: 12, 3: 40, 4: 2, 5: 18}
    assert Recorder.batches == [[4, 5], [6], [20], [1, 9]]


def test_a_cost_that_fails_is_that_items() -> None:
    class Unclear(Recorder):
        max_batch_cost = 10

        def cost(self, item: Any) -> float:
            return 1.0 / float(item)

    assert values(run(Unclear, 1, 0, 2)) == {0: 2, 1: (500, "internal_error"), 2: 4}


def test_nobody_waits_nothing_is_run() -> None:
    assert values(run(Recorder, 1, 2, 3, gone=lambda index: index == 1)) == {0: 2, 2: 6}
    assert Recorder.batches == [[1, 3]]


# answers


class Returns(Handler):
    value: Any = None

    def inference(self, request: Request) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def answer(value: Any, **attributes: Any) -> Reply:
    return run(type("Returns", (Returns,), {"value": value, **attributes}), None)[0]


@dataclass
class Point:
    x: int


class Tensor:
    def tolist(self) -> list[float]:
        return [1.5, float("nan")]


@pytest.mark.parametrize(
    ("value", "body", "media_type"),
    [
        ({"a": "é"}, '{"a":"é"}'.encode(), "application/json"),
        ("text", b'"text"', "application/json"),
        (None, b"null", "application/json"),
        (b"\0\1", b"\0\1", "application/octet-stream"),
        (Point(3), b'{"x":3}', "application/json"),
        (Tensor(), b"[1.5,null]", "application/json"),
        ({1}, b"[1]", "application/json"),
        (Response("hi", 201), b"hi", "text/plain; charset=utf-8"),
        (Response({"a": 1}), b'{"a":1}', "application/json"),
        (Response(b"x", media_type="image/png"), b"x", "image/png"),
        (Response(b"x", 204), b"", "application/octet-stream"),
    ],
)
def test_what_is_returned_is_what_is_sent(value: Any, body: bytes, media_type: str) -> None:
    reply = answer(value)
    assert (reply.body, reply.media_type) == (body, media_type)


def test_json_is_the_same_without_orjson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "orjson", None)
    slow = answers._encoder()
    value = {"a": [1, 2.5, float("inf")], "t": Tensor(), "p": Point(1), "s": "é"}
    assert json.loads(slow(value)) == json.loads(answers.encode(value))


def test_headers_that_cannot_be_sent_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(Response("x", headers={"X-Ok": "1", "Content-Length": "99"})).headers == (("X-Ok", "1"),)
    for headers in ({"X-A": "1\r\nX-B: 2"}, {"X A": "1"}, {"X-A": "语"}):
        assert answer(Response("x", headers=headers)).status == 500
    assert answer(Response("x", 99)).status == 500
    assert answer(Response("x", media_type="a/b\r\nX: 1")).status == 500
    assert "cannot be sent" in capsys.readouterr().err


class TeapotError(Exception):
    """As web frameworks have it."""

    status_code, detail = 418, "short and stout"


@pytest.mark.parametrize(
    ("error", "attributes", "expected"),
    [
        (HTTPError(403, "not you"), {}, (403, "error", "not you")),
        (TeapotError(), {}, (418, "error", "short and stout")),
        (KeyError("voice"), {"errors": {KeyError: 404}}, (404, "not_found", "'voice'")),
        (TimeoutError(), {}, (504, "timeout", "the model ran out of time")),
    ],
)
def test_exceptions_have_their_statuses(error: Exception, attributes: Any, expected: tuple[int, str, str]) -> None:
    reply = answer(error, **attributes)
    assert (reply.status, reply.code, reply.message) == expected


def test_a_secret_in_an_exception_stays_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    reply = answer(RuntimeError("password=hunter2"))
    assert reply.status == 500
    assert "hunter2" not in reply.message
    assert "hunter2" in capsys.readouterr().err


def test_an_error_with_a_status_that_is_none() -> None:
    with pytest.raises(ValueError, match="400 to 599"):
        HTTPError(200, "fine")


# declared bodies


@pytest.mark.parametrize(
    "declared", [Point, {"type": "object", "required": ["x"], "properties": {"x": {"type": "integer"}}}]
)
def test_a_body_is_checked_against_its_declaration(declared: Any) -> None:
    class Strict(Recorder):
        body = declared

        def preprocess(self, request: Request) -> Any:
            return request.json()["x"]

    replies = run(Strict, {"x": 2}, {"x": "two"}, {}, [])
    assert values(replies) == {0: 4, **dict.fromkeys((1, 2, 3), (422, "invalid_body"))}
    assert "x" in replies[1].message


def test_a_checked_body_is_an_instance_of_its_type() -> None:
    class Typed(Recorder):
        body = Point

        def preprocess(self, request: Request) -> Any:
            return request.data.x

    assert values(run(Typed, {"x": 21})) == {0: 42}


# streams


def parts(events: Iterator[Event]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for event in events:
        if isinstance(event, Chunk):
            found.setdefault(event.index, []).append(event.data)
        elif isinstance(event, Closed):
            found.setdefault(event.index, []).append(event.error and event.error.status)
        else:
            for index, reply in event.replies:
                found.setdefault(index, []).append(reply.status)
    return found


class Counts(Handler):
    def inference(self, request: Request) -> Any:
        for number in range(request.json()):
            if number == 3:
                raise RuntimeError("three is too many")
            yield {"n": number}


def test_a_generator_is_a_stream_of_events() -> None:
    assert parts(runner(Counts).run(requests(2))) == {0: [b'data: {"n":0}\n\n', b'data: {"n":1}\n\n', None]}
    head = next(runner(Counts).run(requests(1)))
    assert isinstance(head, Chunk) and head.head is not None and head.head.media_type == "text/event-stream"


def test_a_generator_without_values_is_an_empty_stream() -> None:
    assert parts(runner(Counts).run(requests(0))) == {0: [b"", None]}


def test_a_generator_that_fails_at_once_has_a_status_later_it_has_not() -> None:
    class Refuses(Handler):
        def inference(self, request: Request) -> Any:
            if request.json():
                raise HTTPError(409, "not now")
            yield

    assert parts(runner(Refuses).run(requests(1))) == {0: [409]}
    assert parts(runner(Counts).run(requests(5)))[0][-1] == 500


def test_raw_streams_and_text_with_line_ends() -> None:
    class Raw(Handler):
        streamed_as = "raw"

        def inference(self, request: Request) -> Any:
            yield b"\0"
            yield "é"

    class Text(Handler):
        def inference(self, request: Request) -> Any:
            yield "a\nb\r\nc\rd"

    assert parts(runner(Raw).run(requests(1))) == {0: [b"\0", "é".encode(), None]}
    assert parts(runner(Text).run(requests(1))) == {0: [b"data: a\ndata: b\ndata: c\ndata: d\n\n", None]}


def test_a_reader_who_left_ends_the_generator() -> None:
    closed = []

    class Endless(Handler):
        def inference(self, request: Request) -> Any:
            try:
                while True:
                    yield 1
            finally:
                closed.append(True)

    asked = iter([False, False, True])
    assert parts(runner(Endless).run(requests(1), lambda index: next(asked))) == {0: [b"data: 1\n\n"] * 2 + [None]}
    assert closed == [True]


def test_a_forward_that_yields_streams_to_every_item() -> None:
    class Both(Handler):
        max_batch_size = 4

        def forward(self, batch: list[Any]) -> Any:
            for step in range(max(batch)):
                yield [step if step < most else None for most in batch]

    got = parts(runner(Both).run(requests(1, 3)))
    assert got == {0: [b"data: 0\n\n", None], 1: [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n", None]}
