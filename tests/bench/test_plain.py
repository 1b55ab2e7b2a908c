"""One plain request: where it comes from, what it looks like, and what counts as its answer."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from mdeploy.bench import plan, targets
from mdeploy.bench.request import Ask, BenchRequest, asked, complete, multipart
from mdeploy.bench.stream import Counters, PlainAnswer
from mdeploy.bench.types import BenchOptions, BenchTarget
from mdeploy.errors import ConfigError, NotFoundError, UsageError


def _operation(handler: str, body: bytes, kind: str = "application/json", query: str = "") -> dict[str, Any]:
    encoded = base64.b64encode(body).decode()
    example = {"method": "POST", "path": "/", "query": query, "content_type": kind, "body_base64": encoded}
    return {"post": {"x-mdeploy-handler": handler, "x-mdeploy-example": example}}


ONE = {"paths": {"/echo": _operation("echo", b"1"), "/alias": _operation("echo", b"1"), "/health": {"get": {}}}}
TWO = {"paths": {**ONE["paths"], "/up": _operation("up", b"\x00", "image/png", "a=b")}}


def test_the_example_of_the_only_handler() -> None:
    assert complete(Ask(), ONE) == BenchRequest("/echo", "POST", "application/json", b"1")


def test_several_handlers_ask_for_a_path() -> None:
    with pytest.raises(UsageError, match="/echo, /up"):
        complete(Ask(), TWO)
    assert complete(Ask("/up"), TWO) == BenchRequest("/up?a=b", "POST", "image/png", b"\x00")
    assert complete(Ask("/up?c=d"), TWO).path == "/up?c=d"


def test_without_an_example_a_body_is_asked_for() -> None:
    documents: list[dict[str, Any] | None] = [None, {}, {"paths": {"/x": {"post": {}}}}]
    for document in documents:
        with pytest.raises(NotFoundError, match="no example"):
            complete(Ask(), document)
    with pytest.raises(NotFoundError, match="for /x"):
        complete(Ask("/x"), ONE)
    assert complete(Ask("/x", b"y", "text/plain"), None) == BenchRequest("/x", "POST", "text/plain", b"y")
    assert complete(Ask(None, b"y"), ONE) == BenchRequest("/echo", "POST", "application/json", b"y")


def test_an_example_that_is_no_base64() -> None:
    wrong = {"paths": {"/x": {"post": {"x-mdeploy-example": {"body_base64": "%"}}}}}
    with pytest.raises(ConfigError, match="base64"):
        complete(Ask(), wrong)


def test_the_words_of_a_command_line(tmp_path: Path) -> None:
    image = tmp_path / "cat.jpg"
    image.write_bytes(b"\xff\xd8")
    assert asked(None, None, [], None) is None
    assert asked("/x", '{"a": 1}', [], None) == Ask("/x", b'{"a": 1}', "application/json")
    assert asked(None, f"@{image}", [], None) == Ask(None, b"\xff\xd8", "image/jpeg")
    form = asked(None, None, [f"image=@{image}", "n=3"], None)
    assert form is not None
    assert form.body is not None
    assert b'name="image"; filename="cat.jpg"\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\r\n' in form.body
    assert b'name="n"\r\n\r\n3\r\n' in form.body
    for path, data, files in ((None, "x", ["a=b"]), ("x", None, []), ("/a b", None, []), (None, None, ["ab"])):
        with pytest.raises(UsageError):
            asked(path, data, files, None)
    with pytest.raises(ConfigError, match="cannot read"):
        asked(None, "@/nowhere", [], None)


def test_a_form_is_read_back() -> None:
    from email.parser import BytesParser
    from email.policy import HTTP

    kind, body = multipart([("a", "", "", b"text"), ('q"\r\n', "f.bin", "image/png", b"\r\n--\x00")])
    parts = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    assert [part.get_param("name", header="content-disposition") for part in parts.iter_parts()] == ["a", "q%22%0D%0A"]


def test_the_request_as_it_goes_over_the_wire() -> None:
    request = BenchRequest("/x?y=z", "PUT", "text/plain", b"body")
    target = BenchTarget("http://h:1", "m", "sk-a")
    load = plan.build_plain(target, request, BenchOptions(requests=2), (2, ("127.0.0.1", 1)))
    head, body = plan.request_bytes(load, 7).split(b"\r\n\r\n")
    assert head.splitlines()[0] == b"PUT /x?y=z HTTP/1.1"
    assert {b"Content-Length: 4", b"Authorization: Bearer sk-a", b"Host: h:1"} <= set(head.splitlines())
    assert body == b"body"
    assert "sk-a" not in str(load.workload)
    other = plan.build_plain(target, BenchRequest("/x?y=z", "PUT", "text/plain", b"else"), BenchOptions(), load.address)
    assert other.workload["hash"] != load.workload["hash"]


def _answer(data: bytes, *, closed: bool = False) -> tuple[bool, str | None]:
    answer = PlainAnswer(targets.for_endpoint("http"), Counters(), False)
    answer.feed(data, 1)
    return answer.complete, answer.eof() if closed else answer.verdict()


def test_what_counts_as_an_answer() -> None:
    assert _answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") == (True, None)
    assert _answer(b"HTTP/1.1 204 No Content\r\n\r\n") == (True, None)
    assert _answer(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n") == (True, "http_503")
    assert _answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", closed=True) == (False, "truncated")
    assert _answer(b"HTTP/1.1 200 OK\r\n\r\nhi", closed=True) == (False, None)
    assert _answer(b"nonsense\r\n\r\n") == (True, "bad_response")
