"""Requests of a controller on their way to workers of other processes and machines, over HTTP.

To the edge this is a backend like a local pool. A request that breaks off is tried once more on another worker; a
worker that refuses it (not there, overloaded) costs nothing, so then the next one is asked, until none is left.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from mdeploy.compat.fleet import Fleet, Worker
from mdeploy.serving.backend import Observer, OverloadedError, StreamError
from mdeploy.serving.handler import Request
from mdeploy.serving.info import HandlerInfo, Reply, WorkerState

if TYPE_CHECKING:
    import httpx

MAX_IN_FLIGHT = 256
"""Requests at one worker at a time, at most: what its own queue holds."""

_CONNECT_S = 5.0
_ATTEMPTS = 2
"""Workers that one request may break off at."""

_GONE = 499
"""nginx's status for a client that left; nobody reads it."""

_OF_ONE_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"content-length content-type accept-encoding expect authorization x-request-id".split()
)
_HOP_HEADERS = "connection keep-alive transfer-encoding content-length content-type content-encoding date server"
_EDGE_HEADERS = "x-request-id vary access-control-allow-origin access-control-allow-credentials"
_NOT_RETURNED = frozenset(f"{_HOP_HEADERS} {_EDGE_HEADERS}".split())


def client() -> httpx.AsyncClient:
    """A client that ignores proxies and lets go of idle connections before workers do."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0)
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    return httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, follow_redirects=False)


@dataclass(frozen=True, slots=True)
class Workers:
    """The way to all workers; `alarm` is set when one is to be checked without delay."""

    fleet: Fleet
    http: httpx.AsyncClient
    token: str
    alarm: asyncio.Event


class RemoteBackend:
    """One model on all workers that joined for it."""

    def __init__(self, info: HandlerInfo, workers: Workers, observer: Observer) -> None:
        self.info = info
        self._fleet, self._http, self._token, self._alarm = workers.fleet, workers.http, workers.token, workers.alarm
        self._observer = observer
        self.queued = 0
        self.answered_at = 0.0

    @property
    def in_flight(self) -> int:
        """Requests that workers have."""
        return sum(worker.in_flight for worker in self._fleet.of(self.info.name))

    def workers(self) -> tuple[WorkerState, ...]:
        """Every worker that joined, under its address."""
        return tuple(
            WorkerState(0, worker.address, 0, _state(worker), worker.requests)
            for worker in self._fleet.of(self.info.name)
        )

    def submit(self, request: Request, gone: Callable[[], bool], cost: float = 0.0) -> RemoteCall:
        """Send a request on its way; its cost is for the worker to find out. Raises OverloadedError without one."""
        able = [worker for worker in self._fleet.of(self.info.name) if worker.is_up]
        if not able:
            raise OverloadedError(2.0, f"no worker of {self.info.name} is there at the moment")
        if all(worker.in_flight >= MAX_IN_FLIGHT for worker in able):
            raise OverloadedError(1.0)
        return RemoteCall(self, request, gone)

    async def answer(self, request: Request, gone: Callable[[], bool]) -> tuple[Reply, Stream | None]:
        """The reply of the first worker that gives one, and the rest of it where it streams."""
        import httpx

        tried: list[Worker] = []
        broken = 0
        refusal = Reply(503, "application/json", code="unavailable", message="no worker could take the request")
        while broken < _ATTEMPTS and not gone():
            worker = self._fleet.pick(self.info.name, tried)
            if worker is None:
                return refusal, None
            tried.append(worker)
            try:
                reply, chunks = await self._ask(worker, request)
            except httpx.TransportError as error:
                self.suspect(worker)
                broken += not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                continue
            if reply.status != 503:
                return reply, chunks
            refusal = reply
        if gone():
            return Reply(_GONE, "application/json", code="client_left", message="the client left"), None
        return _broken(broken), None

    async def _ask(self, worker: Worker, request: Request) -> tuple[Reply, Stream | None]:
        """Raises httpx.TransportError."""
        began = time.monotonic()
        worker.in_flight += 1
        streams = False
        try:
            response = await self._http.send(_outgoing(self._http, worker, request, self._token), stream=True)
            streams = "content-length" not in response.headers and response.status_code < 400
            body = b"" if streams else await response.aread()
        finally:
            worker.in_flight -= not streams
        if response.status_code < 500:
            self.answered_at = time.monotonic()
            self._observer.batch(self.info.name, 1, self.answered_at - began)
        return _reply(response, body), Stream(self, worker, response) if streams else None

    def suspect(self, worker: Worker) -> None:
        """A request to it broke off: it is checked without delay."""
        self._fleet.failed(worker)
        self._alarm.set()


class Stream:
    """The rest of a streamed answer. Its worker is busy with it until it ends or is closed."""

    def __init__(self, backend: RemoteBackend, worker: Worker, response: httpx.Response) -> None:
        self._backend, self._worker, self._response = backend, worker, response
        self._parts = response.aiter_bytes()
        self._closing: asyncio.Task[None] | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        import httpx

        try:
            return await anext(self._parts)
        except StopAsyncIteration:
            self.close()
            raise
        except httpx.TransportError as error:
            if self._closing is None:  # it was the worker who ended it
                self._backend.suspect(self._worker)
            self.close()
            raise StreamError("the worker died in the middle of this answer", code="worker_died") from error

    def close(self) -> None:
        """Nobody reads on."""
        if self._closing is None:
            self._worker.in_flight -= 1
            self._closing = asyncio.ensure_future(self._response.aclose())


class RemoteCall:
    """One request on its way."""

    def __init__(self, backend: RemoteBackend, request: Request, gone: Callable[[], bool]) -> None:
        self._backend, self._request, self._gone = backend, request, gone
        self._asking: asyncio.Task[tuple[Reply, Stream | None]] | None = None
        self._cancelled = False
        self.chunks: AsyncIterator[bytes] | None = None
        self.waited_s = 0.0

    async def reply(self) -> Reply:
        """The whole answer, or the head of a stream; 504 at the model's deadline."""
        limit = self._backend.info.timeout
        self._asking = asyncio.ensure_future(
            self._backend.answer(self._request, lambda: self._cancelled or self._gone())
        )
        done, _ = await asyncio.wait([self._asking], timeout=limit)
        if not done:
            self._asking.cancel()
            return Reply(504, "application/json", code="timeout", message=f"no answer within {limit:g} s")
        if self._asking.cancelled():
            return Reply(_GONE, "application/json", code="client_left", message="the client left")
        reply, self.chunks = self._asking.result()
        return reply

    def cancel(self) -> None:
        """Nobody waits any more: the connection to the worker is closed, so that it may drop the request as well."""
        self._cancelled = True
        if self._asking is not None and not self._asking.done():
            self._asking.cancel()
        if isinstance(self.chunks, Stream):
            self.chunks.close()


def _state(worker: Worker) -> Any:
    if not worker.is_up:
        return "stopped" if worker.requests else "starting"
    return "busy" if worker.in_flight else "ready"


def _broken(count: int) -> Reply:
    if not count:
        return Reply(503, "application/json", code="unavailable", message="no worker answers")
    text = f"{count} workers broke off at this request; it is not tried again"
    return Reply(500, "application/json", code="worker_died", message=text)


# a request and its answer on the wire


def _outgoing(http: httpx.AsyncClient, worker: Worker, request: Request, token: str) -> httpx.Request:
    query = urlencode([(name, value) for name in request.query for value in request.query.getlist(name)])
    url = f"{worker.address}{quote(request.path)}" + (f"?{query}" if query else "")
    headers, body = _body(request)
    headers += [(name, value) for name, value in request.headers.raw if name.lower() not in _OF_ONE_CONNECTION]
    headers += [(b"authorization", f"Bearer {token}".encode()), (b"x-request-id", request.id.encode())]
    return http.build_request(request.method, url, headers=headers, content=body)


def _body(request: Request) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Content type and body. The edge took multipart forms apart, here they are put together again."""
    kind = request.headers.get("content-type", "")
    if kind.lower().startswith("multipart/form-data"):
        boundary = secrets.token_hex(16).encode()
        return [(b"content-type", b"multipart/form-data; boundary=" + boundary)], b"".join(
            _multipart(request, boundary)
        )
    return [(b"content-type", kind.encode("latin-1"))] if kind else [], request.body


def _multipart(request: Request, boundary: bytes) -> Iterator[bytes]:
    for name in request.form:
        for value in request.form.getlist(name):
            yield b"--%b\r\nContent-Disposition: form-data; name=%b\r\n\r\n" % (boundary, _quoted(name))
            yield value.encode() + b"\r\n"
    for file in (file for field in request.files for file in request.filelist(field)):
        names = b"name=%b; filename=%b" % (_quoted(file.field), _quoted(file.name))
        yield b"--%b\r\nContent-Disposition: form-data; %b\r\n" % (boundary, names)
        yield b"Content-Type: %b\r\n\r\n" % (file.type or "application/octet-stream").encode("latin-1", "replace")
        yield file.data + b"\r\n"
    yield b"--%b--\r\n" % boundary


def _quoted(name: str) -> bytes:
    """A name in a header of a part, as browsers write it."""
    return b'"%b"' % name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A").encode()


def _reply(response: httpx.Response, body: bytes) -> Reply:
    media_type = response.headers.get("content-type", "application/octet-stream")
    headers = tuple((name, value) for name, value in response.headers.multi_items() if name not in _NOT_RETURNED)
    return Reply(response.status_code, media_type, body, headers)
