"""Requests on their way to workers elsewhere: what arrives, and what happens when a worker does not."""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.policy
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from mdeploy.compat import forward
from mdeploy.compat.fleet import Fleet, Worker
from mdeploy.serving.backend import OverloadedError, StreamError
from mdeploy.serving.handler import File, Request
from mdeploy.serving.info import HandlerInfo
from mdeploy.serving.metrics import Metrics

Writer = asyncio.StreamWriter


class Server:
    """A worker of its own making, one request a connection: remembers what it was asked and does as `behave` says."""

    def __init__(self, behave: Callable[[Writer], Awaitable[None]]) -> None:
        self._behave = behave
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.left = asyncio.Event()
        self.address = ""
        self.talks: set[asyncio.Task[None]] = set()

    def connected(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.talks.add(asyncio.ensure_future(self._talk(reader, writer)))

    async def _talk(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, _, rest = head.partition("\r\n")
        headers = {name.lower(): value for name, value in email.message_from_string(rest).items()}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.seen.append((line, headers, body))
        answering = asyncio.ensure_future(self._behave(writer))
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.left.set()
            answering.cancel()
        leaving.cancel()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def server(behave: Callable[[Writer], Awaitable[None]]) -> AsyncIterator[Server]:
    fake = Server(behave)
    listening = await asyncio.start_server(fake.connected, "127.0.0.1", 0)
    fake.address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        listening.close()
        for talk in fake.talks:
            await talk


def answers(status: str = "200 OK", body: bytes = b'{"ok": 1}', extra: str = "") -> Callable[[Writer], Awaitable[None]]:
    fixed = "content-type: application/json\r\nconnection: close\r\n"
    head = f"HTTP/1.1 {status}\r\n{fixed}content-length: {len(body)}\r\n{extra}\r\n"

    async def behave(writer: Writer) -> None:
        writer.write(head.encode() + body)
        await writer.drain()

    return behave


async def breaks_off(writer: Writer) -> None:
    writer.close()


async def hangs(writer: Writer) -> None:
    await asyncio.sleep(60)


@contextlib.asynccontextmanager
async def backend(*addresses: str, timeout: float = 20.0) -> AsyncIterator[tuple[forward.RemoteBackend, list[Worker]]]:
    fleet = Fleet(time.monotonic)
    workers = [fleet.heard(address, "m") for address in addresses]
    for worker in workers:
        fleet.checked(worker, is_healthy=True)
    async with forward.client() as http:
        way = forward.Workers(fleet, http, "the-token", asyncio.Event())
        yield forward.RemoteBackend(HandlerInfo("m", "/m", timeout=timeout), way, Metrics()), workers


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def nobody_left() -> bool:
    return False


HEADERS = (
    (b"host", b"h"),
    (b"x-a", b"1"),
    (b"content-type", b"application/json; v=1"),
    (b"authorization", b"Bearer client"),
    (b"connection", b"close"),
    (b"content-length", b"99"),
)


def test_a_request_arrives_as_it_was() -> None:
    async def test() -> None:
        async with server(answers(extra="x-one: 1\r\nserver: w\r\n")) as one, backend(one.address) as (to, workers):
            request = Request("POST", "/m", b"a=1&a=%C3%A9&b=", HEADERS, b'{"x": 1}', id="r1")
            reply = await to.submit(request, nobody_left).reply()
            ((line, seen, body),) = one.seen
        assert (reply.status, reply.media_type, reply.body) == (200, "application/json", b'{"ok": 1}')
        assert dict(reply.headers) == {"x-one": "1"}
        assert line == "POST /m?a=1&a=%C3%A9&b= HTTP/1.1"
        assert (seen["content-type"], seen["host"], seen["x-request-id"]) == ("application/json; v=1", "h", "r1")
        assert (seen["authorization"], seen["content-length"], body) == ("Bearer the-token", "8", b'{"x": 1}')
        assert workers[0].in_flight == 0
        assert to.answered_at > 0

    run(test())


def test_forms_are_put_together_again() -> None:
    async def test() -> None:
        async with server(answers()) as one, backend(one.address) as (to, _):
            kind = (b"content-type", b"multipart/form-data; boundary=old")
            files = [File("f", 'a"ü.png', "image/png", b"\r\n--old--\x00"), File("f", "b", "", b"")]
            form = [("t", "1"), ("t", "zwei ü")]
            await to.submit(Request(headers=[kind], form=form, files=files), nobody_left).reply()
            plain = (b"content-type", b"application/x-www-form-urlencoded")
            await to.submit(Request(headers=[plain], body=b"a=1+2&a=%26", form=[("a", "1 2")]), nobody_left).reply()
        (_, headers, body), (_, plain_headers, plain_body) = one.seen
        message = email.message_from_bytes(
            f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + body, policy=email.policy.HTTP
        )
        parts = [
            (p.get_param("name", header="content-disposition"), p.get_payload(decode=True)) for p in message.walk()
        ][1:]
        assert parts == [("t", b"1"), ("t", "zwei ü".encode()), ("f", b"\r\n--old--\x00"), ("f", b"")]
        assert 'filename="a%22ü.png"'.encode() in body
        assert (plain_headers["content-type"], plain_body) == (plain[1].decode(), b"a=1+2&a=%26")

    run(test())


def test_a_worker_that_is_gone_or_breaks_off_costs_no_request() -> None:
    async def test() -> None:
        async with (
            server(breaks_off) as bad,
            server(answers()) as good,
            backend("http://127.0.0.1:1", bad.address, good.address) as (to, workers),
        ):
            replies = [await to.submit(Request(id=str(n)), nobody_left).reply() for n in range(4)]
        assert [reply.status for reply in replies] == [200] * 4
        assert [worker.suspected for worker in workers] == [True, True, False]
        assert all(worker.is_up for worker in workers)  # only a failed check takes them out
        assert len(bad.seen) == 1

    run(test())


def test_a_request_that_breaks_two_workers_is_not_tried_again() -> None:
    async def test() -> None:
        async with (
            server(breaks_off) as one,
            server(breaks_off) as two,
            server(answers()) as three,
            backend(one.address, two.address, three.address) as (to, _),
        ):
            reply = await to.submit(Request(), nobody_left).reply()
        assert (reply.status, reply.code) == (500, "worker_died")
        assert three.seen == []

    run(test())


def test_an_overloaded_worker_sends_it_to_the_next() -> None:
    full = b'{"error": {"message": "full", "type": "server_error", "param": null, "code": "overloaded"}}'

    async def test() -> None:
        busy = answers("503 Service Unavailable", full, "retry-after: 7\r\n")
        async with server(busy) as one, server(answers()) as two, backend(one.address, two.address) as (to, workers):
            assert (await to.submit(Request(), nobody_left).reply()).status == 200
            assert not workers[0].suspected
        async with server(busy) as one, backend(one.address) as (to, _):
            reply = await to.submit(Request(), nobody_left).reply()
        assert (reply.status, reply.body) == (503, full)
        assert ("retry-after", "7") in reply.headers

    run(test())


def test_nobody_there_is_told_at_once() -> None:
    async def test() -> None:
        async with backend() as (to, _):
            with pytest.raises(OverloadedError, match="no worker of m"):
                to.submit(Request(), nobody_left)
        async with server(answers()) as one, backend(one.address) as (to, workers):
            workers[0].in_flight = forward.MAX_IN_FLIGHT
            with pytest.raises(OverloadedError):
                to.submit(Request(), nobody_left)
            workers[0].in_flight = 0
            assert (await to.submit(Request(), lambda: True).reply()).status == 499
            assert one.seen == []
        async with backend("http://127.0.0.1:1") as (to, _):
            assert (await to.submit(Request(), nobody_left).reply()).status == 503

    run(test())


def test_the_deadline_and_a_client_that_leaves_end_the_request_at_the_worker_too() -> None:
    async def test() -> None:
        async with server(hangs) as one, backend(one.address, timeout=0.2) as (to, workers):
            reply = await to.submit(Request(), nobody_left).reply()
            assert (reply.status, reply.code) == (504, "timeout")
            await one.left.wait()
            assert workers[0].in_flight == 0
        async with server(hangs) as one, backend(one.address) as (to, workers):
            call = to.submit(Request(), nobody_left)
            answer = asyncio.ensure_future(call.reply())
            while not one.seen:
                await asyncio.sleep(0.01)
            assert to.in_flight == 1
            call.cancel()
            assert (await answer).status == 499
            await one.left.wait()
            assert workers[0].in_flight == 0

    run(test())


STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
)


def test_streams_go_through_and_tell_when_they_break() -> None:
    async def whole(writer: Writer) -> None:
        writer.write(STREAM + b"5\r\nab\n\nc\r\n0\r\n\r\n")

    async def broken(writer: Writer) -> None:
        writer.write(STREAM + b"2\r\nab\r\n")
        writer.close()

    async def test() -> None:
        async with server(whole) as one, backend(one.address) as (to, workers):
            call = to.submit(Request(), nobody_left)
            assert (await call.reply()).media_type == "text/event-stream"
            assert call.chunks is not None
            assert workers[0].in_flight == 1
            assert b"".join([part async for part in call.chunks]) == b"ab\n\nc"
            assert workers[0].in_flight == 0
        async with server(broken) as one, backend(one.address) as (to, workers):
            call = to.submit(Request(), nobody_left)
            await call.reply()
            assert call.chunks is not None
            with pytest.raises(StreamError):
                assert [part async for part in call.chunks] == [b"never"]
            assert workers[0].suspected
        async with server(whole) as one, backend(one.address) as (to, workers):
            call = to.submit(Request(), nobody_left)
            await call.reply()
            call.cancel()  # before a part was read
            call.cancel()
            assert workers[0].in_flight == 0
            await asyncio.sleep(0)

    run(test())


def test_a_client_that_leaves_a_stream_ends_it_at_the_worker() -> None:
    async def slow(writer: Writer) -> None:
        writer.write(STREAM + b"2\r\nab\r\n")
        await asyncio.sleep(60)

    async def test() -> None:
        async with server(slow) as one, backend(one.address) as (to, workers):
            call = to.submit(Request(), nobody_left)
            await call.reply()
            assert call.chunks is not None
            assert await anext(call.chunks) == b"ab"
            reading = asyncio.ensure_future(anext(call.chunks))
            await asyncio.sleep(0)
            call.cancel()
            await one.left.wait()
            await asyncio.wait([reading])
            assert isinstance(reading.exception(), (StreamError, StopAsyncIteration))
            assert (workers[0].in_flight, workers[0].suspected) == (0, False)

    run(test())


def test_workers_as_health_shows_them() -> None:
    async def test() -> None:
        async with backend("http://w:1", "http://w:2") as (to, (one, two)):
            one.in_flight, two.is_up = 1, False
            assert (
                json.dumps([(w.device, w.state) for w in to.workers()])
                == '[["http://w:1", "busy"], ["http://w:2", "starting"]]'
            )

    run(test())
