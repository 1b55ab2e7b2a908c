"""Messages between edge and worker: whole, in order, large buffers in shared memory that nobody has to remove."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdeploy.serving import wire
from mdeploy.serving.handler import LARGE, File, Request
from mdeploy.serving.info import Reply

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = wire.pair()
    with ours, theirs:
        yield ours, theirs


def sent(pair: Pair, message: object) -> object:
    wire.send(pair[0], message)
    return wire.receive(pair[1])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("size", [0, 1, LARGE - 1, LARGE, 5_000_000])
def test_a_reply_arrives_as_it_was(pair: Pair, size: int) -> None:
    body = os.urandom(size)
    reply = sent(pair, Reply(201, "text/plain", body, (("a", "b"),), "code", "message"))
    assert isinstance(reply, Reply)
    assert (reply.status, bytes(reply.body), reply.headers, reply.message) == (201, body, (("a", "b"),), "message")


def test_a_request_with_files_arrives_as_it_was(pair: Pair) -> None:
    files = [File("image", "a.png", "image/png", b"x" * 100_000), File("image", "b.png", "image/png", b"y")]
    request = Request("PUT", "/p", b"q=1&q=%C3%A9", ((b"X-A", b"1"),), b"raw" * 50_000, [("n", "v")], files, "id-1")
    got = sent(pair, request)
    assert isinstance(got, Request)
    assert (got.method, got.path, got.id, got.body) == ("PUT", "/p", "id-1", b"raw" * 50_000)
    assert got.query.getlist("q") == ["1", "é"]
    assert got.headers["x-a"] == "1"
    assert got.form == {"n": "v"}
    assert [file.data for file in got.filelist("image")] == [b"x" * 100_000, b"y"]
    assert got.files["image"].name == "b.png"


def test_a_message_longer_than_a_packet_goes_through_shared_memory(pair: Pair) -> None:
    assert sent(pair, ["w" * 10] * 100_000) == ["w" * 10] * 100_000


def test_more_large_buffers_than_fit_beside_a_message(pair: Pair) -> None:
    replies = [Reply(200, "x", bytes([i % 251]) * LARGE) for i in range(1100)]
    got = sent(pair, replies)
    assert isinstance(got, list)
    assert [reply.body[0] for reply in got] == [i % 251 for i in range(1100)]


def test_a_view_lives_longer_than_its_message_and_nothing_stays_open_after_it(pair: Pair) -> None:
    before = descriptors()
    reply = sent(pair, Reply(200, "x", b"z" * 1_000_000))
    assert isinstance(reply, Reply)
    view = reply.body
    del reply
    assert bytes(view[-3:]) == b"zzz"
    del view
    assert descriptors() == before


def test_the_end_is_told(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(wire.ClosedError):
        wire.receive(pair[1])
    with pytest.raises(wire.ClosedError):
        wire.send(pair[1], "anybody?")


def test_a_full_socket_blocks_nobody(pair: Pair) -> None:
    pair[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            wire.send(pair[0], "x" * 40_000)
    assert wire.receive(pair[1]) == "x" * 40_000
