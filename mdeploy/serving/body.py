"""Bodies of requests, read as they arrive: every limit holds while reading, and forms are taken apart on the way.

Raises HTTPError for what the client did wrong, ClientLeftError where it did not wait. JSON is not looked at: that is
a worker's task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from mdeploy.serving.exchange import ClientLeftError, Exchange
from mdeploy.serving.handler import Buffer, File, HTTPError
from mdeploy.serving.options import DEFAULT_BODY_BYTES

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartParser

_SLOWEST = 4096
"""Bytes per second that buy a slow client more time."""

_LARGE_FORM = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, and all at once, may take: sizes in bytes.

    `held_bytes` is for the bodies of all requests together.
    """

    body_bytes: int = DEFAULT_BODY_BYTES
    body_timeout_s: float = 30.0
    held_bytes: int = 2 << 30
    parts: int = 1000
    part_header_bytes: int = 8 << 10
    field_bytes: int = 1 << 20


@dataclass(slots=True)
class Content:
    """A body: either as it came, or what a form held."""

    buffer: Buffer = b""
    form: tuple[tuple[str, str], ...] = ()
    files: tuple[File, ...] = ()


class Bodies:
    """Reads bodies, and knows how much of them is in memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0

    def check(self, exchange: Exchange) -> None:
        """Refuse by the headers alone what cannot be taken."""
        headers = exchange.headers
        if int(headers.get(b"content-length", b"0")) > self.limits.body_bytes:
            raise self._too_large()
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.strip().lower() not in (b"identity", b""):
            message = f"the content encoding {encoding.decode('latin-1')} is not supported: send it plain"
            raise HTTPError(415, message, headers={"Accept-Encoding": "identity"})

    async def read(self, exchange: Exchange) -> Content:
        """The body of a request, whatever it is."""
        kind = exchange.headers.get(b"content-type", b"")
        if kind[:19].lower() == b"multipart/form-data":
            return await self._multipart(exchange, kind)
        if kind[:33].lower() == b"application/x-www-form-urlencoded":
            return await self._urlencoded(exchange)
        return Content(await self._raw(exchange))

    def release(self, exchange: Exchange) -> None:
        """The body is not needed any more."""
        self.held -= exchange.held
        exchange.held = 0

    def count(self, exchange: Exchange, size: int) -> None:
        """Another `size` bytes arrived. Raises HTTPError 413 or 503."""
        exchange.bytes_in += size
        exchange.held += size
        self.held += size
        if exchange.bytes_in > self.limits.body_bytes:
            raise self._too_large()
        if self.held > self.limits.held_bytes:
            raise HTTPError(503, "too many large requests at once", code="overloaded", headers={"Retry-After": "1"})

    def _too_large(self) -> HTTPError:
        return HTTPError(413, f"the body is larger than {self.limits.body_bytes} bytes")

    async def _raw(self, exchange: Exchange) -> Buffer:
        if exchange.body_is_here:
            body: bytes = await self._part(exchange)
            return body
        declared = int(exchange.headers.get(b"content-length", b"0"))
        gathered = bytearray(declared)  # pages that nothing is written to take no memory
        if not declared:
            await self._feed(exchange, gathered.extend)
            return memoryview(gathered)
        view, end = memoryview(gathered), 0

        def take(part: bytes) -> None:
            nonlocal end
            view[end : end + len(part)] = part
            end += len(part)

        await self._feed(exchange, take)
        return view

    async def _part(self, exchange: Exchange) -> Any:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        body = message.get("body", b"")
        self.count(exchange, len(body))
        return body

    async def _feed(self, exchange: Exchange, take: Callable[[bytes], object]) -> None:
        """Hand on a body part by part."""
        receive = Receiver(self, exchange)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            take(message.get("body", b""))
            more = message.get("more_body", False)

    async def _urlencoded(self, exchange: Exchange) -> Content:
        body = bytes(await self._raw(exchange))
        if body[:1] in (b"{", b"["):
            return Content(body)  # JSON from `curl -d`, which calls everything a form
        if body.count(b"&") >= self.limits.parts:
            raise HTTPError(413, f"the form has more than {self.limits.parts} fields")
        if len(body) < _LARGE_FORM:
            return Content(body, form=_pairs(body))
        return Content(body, form=await asyncio.to_thread(_pairs, body))

    async def _multipart(self, exchange: Exchange, kind: bytes) -> Content:
        from python_multipart.exceptions import FormParserError

        try:
            form = _Multipart(kind, self.limits)
            await self._feed(exchange, form.write)
        except FormParserError as error:
            raise HTTPError(400, f"the multipart form is malformed: {error}", code="malformed_form") from error
        return form.content()


class Receiver:
    """ASGI's `receive` with limits: on size, and on how long a client may take to send its body.

    A client must send at least `_SLOWEST` after the first seconds. Raises HTTPError.
    """

    def __init__(self, bodies: Bodies, exchange: Exchange) -> None:
        import anyio

        self._bodies, self._exchange = bodies, exchange
        self._until = anyio.current_time() + bodies.limits.body_timeout_s
        self._is_whole = not exchange.has_body

    async def __call__(self) -> Any:
        """The next message."""
        import anyio

        exchange, message = self._exchange, None
        if self._is_whole:
            return await exchange.receive()
        with anyio.CancelScope(deadline=self._until + exchange.bytes_in / _SLOWEST):
            message = await exchange.receive()
        if message is None:
            raise HTTPError(408, f"the body did not arrive in time ({exchange.bytes_in} bytes of it did)")
        if message["type"] == "http.request":
            self._bodies.count(exchange, len(message.get("body", b"")))
            self._is_whole = not message.get("more_body", False)
        return message


def _pairs(body: bytes) -> tuple[tuple[str, str], ...]:
    try:
        return tuple(parse_qsl(body.decode(), keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise HTTPError(400, "the form is not UTF-8", code="malformed_form") from error


class _Multipart:
    """Takes a multipart form apart while it arrives."""

    def __init__(self, kind: bytes, limits: Limits) -> None:
        self._limits = limits
        self._parser = self._parser_of(kind)
        self._form: list[tuple[str, str]] = []
        self._files: list[File] = []
        self._is_whole = False
        self._parts = self._header_bytes = 0
        self._header_name, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = self._file = self._type = ""
        self._is_file = False
        self._data = bytearray()

    def write(self, data: bytes) -> None:
        """The next part of the body. Raises FormParserError, HTTPError."""
        self._parser.write(data)

    def content(self) -> Content:
        """What the form held. Raises HTTPError where its end is missing."""
        if not self._is_whole:
            raise HTTPError(400, "the multipart form ends too early", code="malformed_form")
        return Content(form=tuple(self._form), files=tuple(self._files))

    def _parser_of(self, kind: bytes) -> MultipartParser:
        from python_multipart.multipart import MultipartParser, parse_options_header

        boundary = parse_options_header(kind.decode("latin-1"))[1].get(b"boundary")
        if not boundary:
            raise HTTPError(400, "the multipart form names no boundary", code="malformed_form")
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._limits.parts:
            raise HTTPError(413, f"the form has more than {self._limits.parts} parts")
        self._headers, self._header_bytes, self._data = {}, 0, bytearray()

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_value += data[start:end]

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._limits.part_header_bytes:
            raise HTTPError(413, "a part of the form has headers that are too large")

    def _on_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers(self) -> None:
        from python_multipart.multipart import parse_options_header

        disposition = self._headers.get(b"content-disposition", b"").decode("latin-1")
        kind, options = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in options:
            raise HTTPError(400, "a part of the form has no name", code="malformed_form")
        self._name, self._is_file = _text(options[b"name"]), b"filename" in options
        self._file = _text(options.get(b"filename", b""))
        self._type = self._headers.get(b"content-type", b"application/octet-stream").decode("latin-1")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]
        if not self._is_file and len(self._data) > self._limits.field_bytes:
            raise HTTPError(413, f"the field {self._name} is larger than {self._limits.field_bytes} bytes")

    def _end(self) -> None:
        if self._is_file and not self._file and not self._data:
            return  # a file input that nobody filled in
        if self._is_file:
            self._files.append(File(self._name, self._file, self._type, memoryview(self._data)))
        else:
            self._form.append((self._name, _text(bytes(self._data))))

    def _finish(self) -> None:
        self._is_whole = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise HTTPError(400, "the form is not UTF-8", code="malformed_form") from error
