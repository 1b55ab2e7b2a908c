"""Clients that are broken, slow or hostile, on real sockets: the status is right, and the service stays healthy."""

from __future__ import annotations

import json
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.served import Served, answers, everything, serving
from tests.support import until

MIB = 1 << 20


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("edge")
    with serving(directory, max_body_bytes=MIB, body_timeout_s=1.0, seconds=1.0, size=16384, url_size=4096) as edge:
        yield edge


@pytest.fixture(autouse=True)
def stays_healthy(edge: Served) -> Iterator[None]:
    yield
    assert edge.ask("GET", "/health").status_code == 200
    assert "Traceback" not in edge.log.read_text()


def _head(method: str = "POST", path: str = "/echo", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


# heads


def test_a_head_without_end_is_cut_off_by_size(edge: Served) -> None:
    [answer] = edge.raw(b"GET /echo HTTP/1.1\r\nHost: x\r\nA: ", b"a" * 40_000)
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("headers", [["A: b"] * 150, ["A: " + "b" * 20_000]])
def test_a_head_that_is_too_large_is_refused(edge: Served, headers: list[str]) -> None:
    [answer] = edge.raw(_head("GET", "/echo", *headers))
    assert answer.status == 431


def test_a_url_that_is_too_long_is_refused(edge: Served) -> None:
    [answer] = edge.raw(_head("GET", "/echo?" + "a" * 5000))
    assert (answer.status, answer.error["code"]) == (414, "uri_too_long")


def test_a_head_that_never_ends_times_out(edge: Served) -> None:
    [answer] = edge.raw(b"GET /echo HTTP/1.1\r\nHost:")
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_a_second_head_that_never_ends_times_out_as_well(edge: Served) -> None:
    first, second = edge.raw(_head("GET", "/echo"), b"GET /echo HTT")
    assert (first.status, second.status) == (200, 408)


def test_a_connection_that_says_nothing_is_closed(edge: Served) -> None:
    assert edge.raw() == []


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40,  # TLS
        b"hello\r\n\r\n",
        b"GET /echo HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        _head("POST", "/echo", "Content-Length: 5", "Content-Length: 6") + b"hello",
        _head("POST", "/echo", "Content-Length: -5"),
        _head("POST", "/echo", "Content-Length: 99999999999999999999999"),
        _head("POST", "/echo", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        _head("POST", "/echo", "Transfer-Encoding: chunked") + b"zz\r\n",
        _head("GET", "/echo", "a b: c"),
    ],
)
def test_what_is_no_http_is_refused(edge: Served, text: bytes) -> None:
    [answer] = edge.raw(text)
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.error["type"] == "invalid_request_error"


def test_garbage_after_a_request_does_not_spoil_its_answer(edge: Served) -> None:
    found = edge.raw(_head("GET", "/slow?s=0.2"), b"\x00\x01garbage\r\n\r\n")
    assert [(each.status, each.body) for each in found] == [(200, b'"done"')]


def test_pipelined_requests_are_answered_in_their_order(edge: Served) -> None:
    posts = [_head("POST", "/echo", "Content-Length: 3", f"X-Request-Id: n{n}") + b"n%02d" % n for n in range(20)]
    last = _head("GET", "/echo", "Connection: close")
    found = edge.raw(_head("GET", "/slow?s=0.2") + b"".join(posts) + last)
    assert [each.status for each in found] == [200] * 22
    assert [each.body for each in found[1:-1]] == [b"n%02d" % n for n in range(20)]


@pytest.mark.parametrize("token", ["websocket", "h2c"])
def test_an_offer_of_another_protocol_is_ignored(edge: Served, token: str) -> None:
    headers = (f"Upgrade: {token}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")
    with edge.connect() as client:
        for body in (b"hi", b"hello"):
            text = _head("POST", "/echo", *headers, f"Content-Length: {len(body)}") + body
            assert edge.exchange(client, text).body == body


# bodies


def test_a_body_that_says_it_is_too_large_is_refused_unread(edge: Served) -> None:
    [answer] = edge.raw(_head("POST", "/echo", f"Content-Length: {MIB + 1}"), b"x" * 1000)
    assert (answer.status, answer.headers["connection"], answer.error["code"]) == (413, "close", "body_too_large")


def test_a_client_that_sends_all_of_it_still_gets_the_answer(edge: Served) -> None:
    [answer] = edge.raw(_head("POST", "/echo", f"Content-Length: {8 * MIB}"), *[b"x" * MIB] * 8)
    assert answer.status == 413


def test_a_chunked_body_is_refused_once_it_is_too_large(edge: Served) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    [answer] = edge.raw(_head("POST", "/echo", "Transfer-Encoding: chunked"), *[chunk] * 40)
    assert answer.status == 413


def test_a_body_as_large_as_allowed_arrives(edge: Served) -> None:
    assert edge.ask("POST", "/echo", content=bytes(MIB)).content == bytes(MIB)
    chunks = (bytes(1000) for _ in range(1000))
    assert edge.ask("POST", "/echo", content=chunks).content == bytes(1_000_000)


@pytest.mark.parametrize("path", ["/echo", "/own"])
def test_a_body_that_does_not_come_times_out(edge: Served, path: str) -> None:
    before = edge.seen("echo")["submitted"]
    [answer] = edge.raw(_head("POST", path, "Content-Length: 10"), b"12345")
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert edge.seen("echo")["submitted"] == before


@pytest.mark.parametrize("path", ["/own", "/echo"])
def test_limits_hold_for_routes_of_an_app_too(edge: Served, path: str) -> None:
    [answer] = edge.raw(
        _head("POST", path, "Transfer-Encoding: chunked"), *[b"10000\r\n" + bytes(65536) + b"\r\n"] * 20
    )
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_client_that_waits_for_100_continue_hears_it(edge: Served) -> None:
    with edge.connect() as client:
        client.sendall(_head("POST", "/echo", "Content-Length: 5", "Expect: 100-continue"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert edge.exchange(client, b"hello").body == b"hello"


def test_one_that_is_refused_is_not_told_to_go_on(edge: Served) -> None:
    text = _head("POST", "/nowhere", "Content-Length: 5", "Expect: 100-continue")
    with edge.connect() as client:
        client.sendall(text)
        received = everything(client)
    assert b"100 Continue" not in received
    assert answers(received)[0].status == 404


def test_a_broken_chunk_is_refused(edge: Served) -> None:
    before = edge.seen("echo")["submitted"]
    [answer] = edge.raw(_head("POST", "/echo", "Transfer-Encoding: chunked") + b"5\r\nhello\r\nnonsense\r\n")
    assert answer.status == 400
    assert edge.seen("echo")["submitted"] == before


def test_several_answers_to_large_bodies_on_one_connection(edge: Served) -> None:
    with edge.connect() as client:
        for size in (1, 300_000, 0, MIB):
            text = _head("POST", "/echo", f"Content-Length: {size}") + b"y" * size
            assert edge.exchange(client, text).body == b"y" * size


# forms


def _multipart(*parts: str, end: str = "--B--\r\n") -> bytes:
    return ("".join(f"--B\r\n{part}\r\n" for part in parts) + end).encode()


_FIELD = 'Content-Disposition: form-data; name="a"\r\n\r\n1'


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data", _multipart(_FIELD), 400),
        ("multipart/form-data; boundary=", _multipart(_FIELD), 400),
        ("multipart/form-data; boundary=C", _multipart(_FIELD), 400),
        ("multipart/form-data; boundary=" + "B" * 300, _multipart(_FIELD), 400),
        ("multipart/form-data; boundary=B", _multipart(_FIELD, end=""), 400),
        ("multipart/form-data; boundary=B", b"--B\r\n\r\nno headers\r\n--B--\r\n", 400),
        ("multipart/form-data; boundary=B", _multipart("Content-Disposition: form-data\r\n\r\n1"), 400),
        (
            "multipart/form-data; boundary=B",
            _multipart(_FIELD).replace(b"1", b"\xff"),
            400,
        ),
        ("multipart/form-data; boundary=B", _multipart(*[_FIELD] * 1001), 413),
        ("multipart/form-data; boundary=B", _multipart("\r\n".join(f"A{n}: b" for n in range(50)) + "\r\n\r\n1"), 400),
        ("application/x-www-form-urlencoded", b"&".join(b"a=%d" % n for n in range(1200)), 413),
        ("application/x-www-form-urlencoded", b"a=%ff", 400),
        ("application/x-www-form-urlencoded", b"a=1&b=%zz&&c", 200),
    ],
)
def test_forms_that_are_wrong_are_refused(edge: Served, kind: str, body: bytes, status: int) -> None:
    before = edge.seen("form")["submitted"]
    answer = edge.ask("POST", "/form", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert edge.seen("form")["submitted"] == before + (status == 200)


def test_a_form_that_comes_byte_by_byte_is_whole(edge: Served) -> None:
    data = b"\r\n--B\r-\r\n--" * 30
    file = 'Content-Disposition: form-data; name="f"; filename="\u4f60.bin"\r\n\r\n' + data.decode()
    body = _multipart(file, _FIELD).replace(b"--B\r\nContent", b"--BB\r\nContent").replace(b"--B--", b"--BB--")
    kind = "Content-Type: multipart/form-data; boundary=BB"
    head = _head("POST", "/form", kind, f"Content-Length: {len(body)}", "Connection: close")
    [answer] = edge.raw(head, *[body[n : n + 1] for n in range(len(body))])
    files = [["f", "\u4f60.bin", "application/octet-stream", len(data)]]
    assert json.loads(answer.body) == {"form": [["a", "1"]], "files": files, "body": 0}


# disconnects


_SOME = _head("POST", "/echo", "Content-Length: 10")


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /ec",
        _head("POST", "/echo", "Content-Length: 10"),
        _head("POST", "/echo", "Content-Length: 10") + b"123",
    ],
)
def test_a_client_that_leaves_early_reaches_no_handler(edge: Served, sent: bytes) -> None:
    before = edge.seen("echo")["submitted"]
    for leave in (socket.socket.close, _reset):
        client = edge.connect()
        client.sendall(sent)
        leave(client)
    assert edge.seen("echo")["submitted"] == before


def test_a_client_that_leaves_while_it_waits_takes_its_request_with_it(edge: Served) -> None:
    before = edge.seen("slow")["cancelled"]
    with edge.connect() as client:
        client.sendall(_head("GET", "/slow?s=20", "X-Request-Id: left-waiting"))
        until(lambda: edge.seen("slow")["submitted"] > before)
    until(lambda: edge.seen("slow")["cancelled"] == before + 1)


def test_one_that_leaves_with_requests_in_its_pipeline(edge: Served) -> None:
    before = edge.seen("slow")
    with edge.connect() as client:
        client.sendall(_head("GET", "/slow?s=0.5", "X-Request-Id: left-pipeline") * 3)
        until(lambda: edge.seen("slow")["submitted"] == before["submitted"] + 1)
    edge.line("left-pipeline")
    assert edge.seen("slow")["submitted"] < before["submitted"] + 3


def test_one_that_leaves_in_the_middle_of_a_stream_ends_it(edge: Served) -> None:
    before = edge.seen("stream")["cancelled"]
    with edge.connect() as client:
        client.sendall(_head("GET", "/stream?n=100000000&size=9999", "X-Request-Id: left-stream"))
        assert client.recv(1000)
    until(lambda: edge.seen("stream")["cancelled"] == before + 1)
    assert edge.line("left-stream")["status"] == 499


def test_one_that_does_not_read_its_stream_makes_it_wait(edge: Served) -> None:
    before = edge.memory()
    with edge.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(_head("GET", "/stream?n=10000000&size=9999"))
        assert client.recv(1000)
        for _ in range(20):
            assert edge.ask("GET", "/health").status_code == 200
        assert edge.memory() - before < 32 * MIB


def test_one_that_stops_reading_its_stream_loses_it(tmp_path: Path) -> None:
    with serving(tmp_path, read_seconds=0.3) as edge, edge.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(_head("GET", "/stream?n=100000000&size=9999", "X-Request-Id: stalled"))
        assert client.recv(1000)
        assert edge.line("stalled")["status"] == 499
        assert edge.seen("stream")["cancelled"] == 1


def test_one_that_reads_slowly_gets_all_of_it(tmp_path: Path) -> None:
    with serving(tmp_path, read_seconds=0.3) as edge, edge.connect() as client:
        client.sendall(_head("POST", "/echo", f"Content-Length: {24 * MIB}") + bytes(24 * MIB))
        received = 0
        while received < 24 * MIB:
            chunk = client.recv(256 << 10)
            assert chunk
            received += len(chunk)
            time.sleep(0.01)


# many


def test_two_thousand_connections_at_once(edge: Served) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    clients: list[socket.socket] = []
    try:
        for _ in range(2000):
            clients.append(edge.connect())
            clients[-1].sendall(_head("POST", "/slow?s=0.5", "Content-Length: 2") + b"{}")
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        many = edge.memory()
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for _ in range(3):  # what was allocated once is used again
        assert edge.ask("POST", "/echo", content=bytes(MIB)).status_code == 200
    assert edge.memory() <= many + 16 * MIB


def test_more_bodies_than_memory_for_them_are_shed(tmp_path: Path) -> None:
    with serving(tmp_path, max_held_bytes=2 * MIB) as small:

        def is_shed() -> bool:
            """While one client is slow with a large body, another is refused; the race may go the other way round."""
            with small.connect() as first:
                first.sendall(_head("POST", "/echo", f"Content-Length: {2 * MIB}") + bytes(MIB + MIB // 2))
                return small.ask("POST", "/echo", content=bytes(MIB)).status_code == 503

        until(is_shed)
        until(lambda: small.ask("POST", "/echo", content=bytes(MIB)).status_code == 200)
