"""One connection as uvicorn handles it, with bounds on what comes before a request's body, and an end that is heard.

uvicorn reads a head of any size for any time, closes while the client is still sending (the answer is then lost), and
tells only the latest of several pipelined requests that the client left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mdeploy.serving import problem
from mdeploy.serving.handler import Buffer
from mdeploy.serving.memory import Tide

_LINGER_S = 5.0
_SLOWEST = 1024
_MALFORMED = "the request is no valid HTTP/1.1"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may take: sizes in bytes, `seconds` from the first byte of a head to its last.

    A connection that never sends anything ends after as long. Of `connections` open at once one more is refused. One
    that takes less than `_SLOWEST` bytes per second of its answer for `read_seconds` is cut: a stream keeps a worker.
    """

    size: int = 64 << 10
    url_size: int = 16 << 10
    count: int = 100
    seconds: float = 15.0
    connections: int = 20_000
    read_seconds: float = 30.0


class _RefusedError(Exception):
    """Thrown through the parser; the connection knows why."""


class _Transport:
    """uvicorn's way to the client: `close` waits for a client that is still sending."""

    __slots__ = ("_kept", "_protocol", "_real", "get_extra_info", "is_lingering", "pause_reading", "resume_reading")

    def __init__(self, real: asyncio.Transport, protocol: Connection) -> None:
        self._real, self._protocol = real, protocol
        self.get_extra_info = real.get_extra_info
        self.pause_reading, self.resume_reading = real.pause_reading, real.resume_reading
        self.is_lingering = False
        self._kept: bytes | None = None

    def cork(self) -> None:
        """Keep what is written next, and send it together with what is written after that."""
        self._kept = b""

    def write(self, data: Buffer) -> None:
        kept = self._kept
        if kept is None:
            self._real.write(data)
        elif not kept:
            self._kept = bytes(data)
        else:
            self._kept = None
            self._real.write(kept + data)

    def is_closing(self) -> bool:
        return self.is_lingering or self._real.is_closing()

    def close(self) -> None:
        if not self.is_lingering and self._protocol.is_receiving and not self._real.is_closing():
            self.is_lingering = True
            self._protocol.linger(self._real)
        elif not self.is_lingering:
            self._real.close()

    def abort(self) -> None:
        self._real.abort()


class Connection(HttpToolsProtocol):
    """A connection of ours. `limits` are set on a subclass by `limited`, whose connections share `tide`."""

    limits = ConnectionLimits()
    tide = Tide()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._active: RequestResponseCycle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._unread = 0
        self._in_head = self._discards = False
        self._head_size = self._headers_size = 0
        self._refusal = 0, ""

    # uvicorn's and the parser's callbacks

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        wrapped: Any = _Transport(transport, self)
        super().connection_made(wrapped)
        self.tide.rose(len(self.connections))
        if len(self.connections) > self.limits.connections:
            self._discards = True
            self._answer(503, "too many connections", "overloaded")
            transport.close()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It left, or we closed."""
        self._stop_waiting()
        self.pipeline.clear()
        active = self._active
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_watching()
        self.tide.fell(len(self.connections))
        if active is not None and not active.response_complete:
            active.disconnected = True
            active.message_event.set()
            on_leave: Callable[[], None] | None = getattr(active, "on_leave", None)
            if on_leave is not None:
                on_leave()

    def data_received(self, data: bytes) -> None:
        """Bytes of it."""
        if self._discards:
            return
        self._unset_keepalive_if_required()
        self._feed(data)
        if not self._in_head:
            return
        self._head_size += len(data)  # a header without end is in no callback yet
        if self._head_size > self.limits.size:
            self._refuse(431, "the headers are too large")
            self.send_400_response(_MALFORMED)
        elif self._timer is None:
            self._wait()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._feed_again(data[upgrade.args[0] :])
        except HttpParserError:
            self.send_400_response(_MALFORMED)

    def _feed_again(self, rest: bytes) -> None:
        """Read a request on as if it had not offered another protocol: the parser would leave its body alone.

        Java's HttpClient and `curl --http2` offer h2c with every first request.
        """
        hop = [
            token.strip().lower()
            for name, value in self.headers
            if name == b"connection"
            for token in value.split(b",")
        ]
        kept = [pair for pair in self.headers if pair[0] not in (b"connection", b"upgrade", *hop)]
        if b"close" in hop:
            kept.append((b"connection", b"close"))
        lines = [self.scope["method"].encode(), b" ", self.url, b" HTTP/1.1\r\n"]
        lines += [name + b": " + value + b"\r\n" for name, value in kept]
        self.parser = HttpRequestParser(self)
        self._feed(b"".join([*lines, b"\r\n", rest]))

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head = True
        self._head_size = self._headers_size = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of its URL."""
        self.url += url
        if len(self.url) > self.limits.url_size:
            raise self._refuse(414, "the URL is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._headers_size += len(name) + len(value)
        if self._headers_size > self.limits.size:
            raise self._refuse(431, "the headers are too large")
        if len(self.headers) > self.limits.count:
            raise self._refuse(431, f"more than {self.limits.count} headers")

    def on_headers_complete(self) -> None:
        """All of them."""
        self._in_head = False
        if self._timer is not None:
            self._stop_waiting()
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            return
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise self._refuse(400, "CONNECT is not supported")
        self.scope["method"] = method.decode()

    def on_message_complete(self) -> None:
        """The end of a request."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client takes its answer more slowly than it comes."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """It took nearly all of it."""
        super().resume_writing()
        self._stop_watching()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more was asked; `close` would wait for ever for one that did not take its last answer."""
        if self._read_timer is None and self._real.get_write_buffer_size():
            self._real.abort()
        elif self._read_timer is None:
            super().timeout_keep_alive_handler()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """What came is not to be understood, or too much; what was asked before is answered first."""
        status, message = self._refusal
        cycle = self.cycle
        self._discards, self._in_head = True, False
        self._stop_waiting()
        if not self._is_idle and (self._active is not cycle or cycle.response_started or not cycle.more_body):
            cycle.keep_alive = False
            return
        self._answer(status or 400, message or _MALFORMED)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.linger(self._real)

    # ours

    @property
    def is_receiving(self) -> bool:
        """Whether the client may be in the middle of a body."""
        cycle = self._active
        return cycle is not None and cycle.more_body

    @property
    def _real(self) -> Any:
        return self.transport._real  # type: ignore[attr-defined]

    def linger(self, transport: Any) -> None:
        """Close, but read on for a while: bytes that nobody reads would make the kernel throw our answer away."""
        self._discards = True
        if transport.is_closing():
            return
        transport.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()
        self._stop_waiting()
        self._timer = self.loop.call_later(_LINGER_S, transport.abort)

    def shutdown(self) -> None:
        """The server ends: at once where nothing is under way, else with the answer."""
        self._discards = self._discards or (self._in_head and self._is_idle)
        for cycle in (self._active, self.cycle):
            if cycle is not None:
                cycle.keep_alive = False
        if self._is_idle:
            self._real.close()

    def abort(self) -> None:
        """End it whatever is under way."""
        self._real.abort()

    @property
    def _is_idle(self) -> bool:
        return self._active is None or self._active.response_complete

    def _refuse(self, status: int, message: str) -> _RefusedError:
        self._refusal = status, message
        return _RefusedError(message)

    def _answer(self, status: int, message: str, code: str = "") -> None:
        body = problem.document(status, message, code)
        lines = [STATUS_LINE[status]]
        lines += [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        lines.append(b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
        self._real.write(b"".join([*lines, body]))

    def _watch_reading(self) -> None:
        self._unread = self._real.get_write_buffer_size()
        self._read_timer = self.loop.call_later(self.limits.read_seconds, self._check_reading)

    def _stop_watching(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _check_reading(self) -> None:
        if self._unread - self._real.get_write_buffer_size() < _SLOWEST * self.limits.read_seconds:
            self._real.abort()
        else:
            self._watch_reading()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.limits.seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._in_head and self._is_idle:
            self._refuse(408, "the head of the request did not arrive in time")
            self.send_400_response(_MALFORMED)
        elif self._is_idle:
            self._real.close()


def limited(limits: ConnectionLimits) -> type[Connection]:
    """The protocol with these limits."""
    return type("LimitedConnection", (Connection,), {"limits": limits, "tide": Tide()})
