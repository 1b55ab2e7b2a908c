"""One HTTP request and its answer, as the edge's own endpoints see them. Knows ASGI, nothing of handlers."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from mdeploy.serving import problem
from mdeploy.serving.backend import StreamError
from mdeploy.serving.handler import Buffer, HTTPError

LEFT = 499
"""What the log says of a client that left before its answer (nginx's number; never sent)."""

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_BAD_HEADER = re.compile(r"[^!#$%&'*+.^_`|~0-9A-Za-z-]")
_BAD_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")
_OURS = frozenset({"content-length", "content-type", "transfer-encoding", "connection", "keep-alive", "x-request-id"})
_ID_PREFIX = secrets.token_hex(4)
_SMALL = 64 << 10
_NO_BODY = frozenset({204, 304})
_numbers = itertools.count(1)

RawHeaders = list[tuple[bytes, bytes]]


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    """A request with what is counted of it. `status` is 0 until the head of an answer was sent.

    `extra` are headers that every answer carries. `held` are the bytes of its body in memory.
    """

    __slots__ = (
        "_cork",
        "_cycle",
        "_gone",
        "_send",
        "_watcher",
        "bytes_in",
        "bytes_out",
        "complete",
        "extra",
        "handler",
        "headers",
        "held",
        "id",
        "method",
        "path",
        "receive",
        "scope",
        "started",
        "status",
        "waited_s",
    )

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.started = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id")
        if given is not None and _SANE_ID.fullmatch(given):
            self.id = given.decode()
        else:
            self.id = f"{_ID_PREFIX}-{next(_numbers):x}"
        self.extra: RawHeaders = [(b"x-request-id", self.id.encode())]
        self.handler = ""
        self.status = self.bytes_in = self.bytes_out = self.held = 0
        self.waited_s = 0.0
        self.complete = False
        # uvicorn's own state of the request: asking it costs no task. Other servers have none.
        cycle = getattr(receive, "__self__", None)
        self._cycle = cycle if hasattr(cycle, "disconnected") else None
        # Ours can send head and body of a small answer in one system call.
        self._cork = getattr(getattr(self._cycle, "transport", None), "cork", None)
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    # the request

    @property
    def has_body(self) -> bool:
        """Whether the client sends a body."""
        return self.headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.headers

    @property
    def body_is_here(self) -> bool:
        """Whether the whole body has arrived already; False where that cannot be told."""
        return self._cycle is not None and not self._cycle.more_body

    @property
    def client(self) -> str:
        """The address on the other side of the connection."""
        client = self.scope.get("client")
        return client[0] if client else ""

    def gone(self) -> bool:
        """Whether the client has left."""
        return self._gone if self._cycle is None else bool(self._cycle.disconnected)

    def on_leave(self, callback: Callable[[], None]) -> None:
        """Call back when the client leaves. The body must have been read."""
        if self._cycle is not None:
            self._cycle.on_leave = callback
        elif self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch(callback))

    async def _watch(self, callback: Callable[[], None]) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.complete:
            self._gone = True
            callback()

    # the answer

    async def whole(
        self, status: int, media_type: str, body: Buffer, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Send a whole answer."""
        self.status = status
        head: RawHeaders = [*self.extra, *headers]
        if status in _NO_BODY:
            body = b""
        else:
            head.append((b"content-type", media_type.encode("latin-1")))
            head.append((b"content-length", b"%d" % len(body)))
        send = self._send
        if self._cork is not None and len(body) < _SMALL and self.method != "HEAD":
            self._cork()
        await send({"type": "http.response.start", "status": status, "headers": head})
        self.bytes_out = len(body)
        self.complete = True
        await send({"type": "http.response.body", "body": body})

    async def refuse(self, error: HTTPError) -> None:
        """Send an error. The connection is closed where the client may still be sending its body."""
        headers = encoded(error.headers.items())
        if self.has_body and not self.body_is_here:
            headers.append((b"connection", b"close"))
        body = problem.document(error.status, error.message, error.code or "", error.param)
        await self.whole(error.status, "application/json", body, headers)

    async def begin(self, status: int, media_type: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send the head of a stream."""
        self.status = status
        head = [*self.extra, *headers, (b"content-type", media_type.encode("latin-1"))]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def send(self, chunk: bytes) -> None:
        """Send a part of a stream, once the client has taken enough of what came before. Raises ClientLeftError."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self.bytes_out += len(chunk)
        if self.gone():
            raise ClientLeftError

    async def end(self) -> None:
        """End a stream. Raises ClientLeftError."""
        if self.gone():
            raise ClientLeftError
        self.complete = True
        await self._send({"type": "http.response.body", "body": b""})

    def cut(self) -> None:
        """End a stream so that the client sees that it is not whole."""
        self.complete = True
        cycle = self._cycle
        if cycle is None:
            raise ClientLeftError
        cycle.disconnected = True
        cycle.transport.close()

    async def stream(self, chunks: AsyncIterator[bytes], *, is_sse: bool, step: Callable[[], None]) -> None:
        """Send every part, and tell of an error in the way the client expects. Raises ClientLeftError."""
        try:
            async for chunk in chunks:
                await self.send(chunk)
                step()
        except StreamError as error:
            self.status = 500  # as the log and the metrics have it; the client saw the head of a good answer
            if not is_sse:
                self.cut()
                return
            await self.send(b"event: error\ndata: " + problem.document(500, error.message, error.code) + b"\n\n")
        await self.end()

    # in between

    async def counted_send(self, message: Any) -> None:
        """What FastAPI's routes send through: adds our headers, and sees what goes out."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *self.extra]
            if self.status >= 400 and self.has_body and not self.body_is_here:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self._send(message)

    def close(self) -> None:
        """Let go of what only the request needed: uvicorn's cycle and ours hold each other otherwise."""
        if self._cycle is not None:
            self._gone = bool(self._cycle.disconnected)
            self._cycle.on_leave = None
            self._cycle = self._cork = None
        if self._watcher is not None:
            self._watcher.cancel()


def encoded(headers: Iterable[tuple[str, str]]) -> RawHeaders:
    """Headers of a handler as they are sent, without those that are not its business.

    Raises ValueError for one that cannot be sent.
    """
    found: RawHeaders = []
    for name, value in headers:
        if _BAD_HEADER.search(name) or not name or _BAD_VALUE.search(value):
            raise ValueError(f"{name!r} is no header that can be sent: {value[:100]!r}")
        if name.lower() not in _OURS:
            found.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    return found


def exchange_of(scope: Mapping[str, Any]) -> Exchange:
    """The exchange of a request that a FastAPI route got: its id, `gone`, and which handler to count it for."""
    found = scope["mdeploy.exchange"]
    assert isinstance(found, Exchange)
    return found
