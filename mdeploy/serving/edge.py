"""The HTTP edge: a FastAPI application in front of handlers, which it knows only as backends.

One layer around everything does keys, limits, request ids, errors, metrics and the access log, so that a route that
somebody adds with `add_api_route` gets them without doing anything. Handlers themselves are answered before FastAPI's
routing, which would cost more than the rest of the edge. Nothing here imports a user's code.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest

from mdeploy.errors import ConfigError
from mdeploy.serving import openapi, pages, problem
from mdeploy.serving.access import Access, AccessLog
from mdeploy.serving.auth import Keys
from mdeploy.serving.backend import Backend, Call
from mdeploy.serving.body import Bodies, Content, Limits, Receiver
from mdeploy.serving.exchange import LEFT, ClientLeftError, Exchange, encoded, exchange_of
from mdeploy.serving.handler import HTTPError, Request
from mdeploy.serving.health import Extra, Finding, Readiness, health
from mdeploy.serving.info import HandlerInfo, Reply
from mdeploy.serving.metrics import MEDIA_TYPE, Metrics
from mdeploy.serving.options import DEFAULT_BODY_BYTES

_log = logging.getLogger("mdeploy.serving")

_SYSTEM = ("/health", "/ready", "/metrics")
_JSON = "application/json"
_EMPTY = Content()
_SSE_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


@dataclass(frozen=True, slots=True)
class EdgeOptions:
    """How a service meets its clients. `cors` are origins of web pages that may ask it, or `*`.

    `max_body_bytes` is for one request, `max_held_bytes` for the bodies of all that are in memory at once.
    `index` is the page at `/`; without one, `/` leads to the documentation.
    """

    max_body_bytes: int = DEFAULT_BODY_BYTES
    max_held_bytes: int = 2 << 30
    body_timeout_s: float = 30.0
    cors: tuple[str, ...] = ()
    access_log: bool = True
    index: Path | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One of our own paths. The log leaves out good answers of a quiet one."""

    methods: frozenset[str]
    answer: Callable[[Exchange], Awaitable[None]]
    is_quiet: bool = False

    @property
    def allow(self) -> str:
        """The value of the Allow header."""
        return ", ".join(sorted({*self.methods, "OPTIONS"}))


@dataclass(frozen=True, slots=True)
class Front:
    """What a service of ours shows in place of one path for each handler.

    `paths` describes the routes as OpenAPI has it. `health` adds to the document of /health.
    """

    routes: Mapping[str, Route]
    paths: Mapping[str, Any] = field(default_factory=dict)
    health: Extra | None = None


MakeFront = Callable[["Service", Mapping[str, Backend]], Front]


def create_app(
    backends: Mapping[str, Backend],
    options: EdgeOptions,
    keys: Keys,
    metrics: Metrics,
    *,
    title: str,
    health_extra: Extra | None = None,
    front: MakeFront | None = None,
    **fastapi: Any,
) -> Service:
    """The application. `health_extra` adds to the document of /health; `fastapi` goes to FastAPI.

    With a `front`, handlers are reached through its routes only.
    Raises ConfigError where handlers claim the same path, or one of ours.
    """
    app = Service(title, options, keys, metrics, fastapi)
    app.bind(backends, health_extra, front)
    return app


class Service(FastAPI):
    """FastAPI with handlers in front of its routes and one layer around both."""

    def __init__(
        self, title: str, options: EdgeOptions, keys: Keys, metrics: Metrics, fastapi: Mapping[str, Any]
    ) -> None:
        super().__init__(title=title, openapi_url=None, docs_url=None, redoc_url=None, **fastapi)
        self._options, self._keys, self.metrics = options, keys, metrics
        self._bodies = Bodies(Limits(options.max_body_bytes, options.body_timeout_s, options.max_held_bytes))
        self._access_log = AccessLog() if options.access_log else None
        self._cors = _cors(options.cors)
        self._infos: tuple[HandlerInfo, ...] = ()
        self._front: Front | None = None
        self._table: dict[str, Route] = {}
        openapi.add_docs(self)
        pages.add_index(self, options.index)
        pages.add_error_handlers(self)

    def bind(
        self, backends: Mapping[str, Backend], health_extra: Extra | None = None, make_front: MakeFront | None = None
    ) -> None:
        """Answer for these handlers. Raises ConfigError for paths that clash."""
        readiness = Readiness(backends)
        front = self._front = make_front(self, backends) if make_front else None
        extras = [extra for extra in (health_extra, front and front.health) if extra]
        both = frozenset({"GET", "HEAD", "POST"})

        def more() -> dict[str, Any]:
            return {name: value for extra in extras for name, value in extra().items()}

        async def ready(exchange: Exchange) -> None:
            await _send_finding(exchange, await readiness.ready())

        async def live(exchange: Exchange) -> None:
            await _send_finding(exchange, health(backends, more, has_paths=front is None))

        async def figures(exchange: Exchange) -> None:
            await exchange.whole(200, MEDIA_TYPE, self.metrics.text())

        self._table = {
            "/health": Route(both, live, is_quiet=True),
            "/ready": Route(both, ready, is_quiet=True),
            "/metrics": Route(frozenset({"GET", "HEAD"}), figures, is_quiet=True),
        }
        if front is not None:
            self._table.update(front.routes)
        else:
            for name in backends:
                self._add_handler(name, backends)
            self._infos = tuple(backend.info for backend in backends.values())
        self.metrics.watch(backends)
        self.openapi_schema = None

    def _add_handler(self, name: str, backends: Mapping[str, Backend]) -> None:
        info = backends[name].info
        methods = frozenset({*info.methods, "HEAD"} if "GET" in info.methods else info.methods)

        async def answer(exchange: Exchange) -> None:
            await self._infer(exchange, name, backends[name])

        for path in (info.path, *info.aliases):
            if path in self._table or path in openapi.PAGES:
                other = "the service itself" if path in (*_SYSTEM, *openapi.PAGES) else "another handler"
                raise ConfigError(f"handler {name}: the path {path} is taken by {other}", hint="give it another `path`")
            self._table[path] = Route(methods, answer)

    def openapi(self) -> dict[str, Any]:
        """The document of every route and handler."""
        if self.openapi_schema is None:
            paths = self._front.paths if self._front else {}
            document = super().openapi()
            self.openapi_schema = openapi.describe(document, self._infos, paths, has_keys=self._keys.required)
        return self.openapi_schema

    # the layer around everything

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            try:
                await super().__call__(scope, receive, send)
            finally:
                self.flush()
            return
        exchange = Exchange(scope, receive, send)
        try:
            await self._guarded(exchange)
        except ClientLeftError:
            exchange.status = LEFT
        except asyncio.CancelledError:
            await self._cancelled(exchange)
        except Exception as error:
            await self._failed(exchange, error)
        finally:
            self._account(exchange)

    def flush(self) -> None:
        """Write what the access log still holds."""
        if self._access_log is not None:
            self._access_log.flush()

    async def _guarded(self, exchange: Exchange) -> None:
        if self._cors is not None and b"origin" in exchange.headers and await self._preflight(exchange, self._cors):
            return
        if self._keys.required:
            self._admit(exchange)
        if exchange.has_body:
            self._bodies.check(exchange)
        route = self._table.get(exchange.path)
        if route is None:
            await self._fall_through(exchange)
        elif exchange.method in route.methods:
            await route.answer(exchange)
        elif exchange.method == "OPTIONS":
            await exchange.whole(204, "", b"", [(b"allow", route.allow.encode())])
        else:
            raise HTTPError(405, f"{exchange.method} is not supported here", headers={"Allow": route.allow})

    def _admit(self, exchange: Exchange) -> None:
        """Raises HTTPError 401 where a key is needed and not there."""
        path, given = exchange.path, exchange.headers.get(b"authorization", b"")
        if self._keys.allows(given) or path == "/health":
            return
        if path == "/" and path not in self._table and exchange.method in ("GET", "HEAD"):
            return
        challenge = "Bearer"
        if openapi.is_page(path):
            if self._keys.allows_basic(given):
                return
            challenge = 'Basic realm="the API key is the password", Bearer'
        message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        raise HTTPError(401, message, headers={"WWW-Authenticate": challenge})

    async def _preflight(self, exchange: Exchange, cors: CORSMiddleware) -> bool:
        """Let a page of another origin read the answer; True where it only asked whether it may ask."""
        request = HTTPRequest(exchange.scope)
        if exchange.method == "OPTIONS" and "access-control-request-method" in request.headers:
            response = cors.preflight_response(request.headers)
            await exchange.whole(
                response.status_code, "text/plain", bytes(response.body), _without_length(response.raw_headers)
            )
            return True
        origin = request.headers["origin"]
        if cors.is_allowed_origin(origin):
            allowed = "*" if cors.allow_all_origins else origin
            exchange.extra.append((b"access-control-allow-origin", allowed.encode("latin-1")))
            exchange.extra.append((b"access-control-expose-headers", b"x-request-id, retry-after"))
        exchange.extra.append((b"vary", b"Origin"))
        return False

    async def _fall_through(self, exchange: Exchange) -> None:
        """FastAPI's routes: documentation, the page, and what an app added."""
        exchange.scope["mdeploy.exchange"] = exchange
        receive = pages.refusing(Receiver(self._bodies, exchange))
        await super().__call__(exchange.scope, receive, exchange.counted_send)

    async def _cancelled(self, exchange: Exchange) -> None:
        if exchange.gone():
            exchange.status = LEFT
        elif exchange.status == 0:
            error = HTTPError(503, "the service is stopping", code="stopping", headers={"Retry-After": "1"})
            await exchange.refuse(error)
        elif not exchange.complete:
            exchange.cut()

    async def _failed(self, exchange: Exchange, error: Exception) -> None:
        known = problem.known(error)
        if known is None:
            _log.error("%s %s (%s) failed", exchange.method, exchange.path, exchange.id, exc_info=error)
        if exchange.status == 0:
            await exchange.refuse(known or HTTPError(500, "internal error; the service's log says why"))
        elif not exchange.complete:
            exchange.cut()

    def _account(self, exchange: Exchange) -> None:
        self._bodies.release(exchange)
        exchange.close()
        if exchange.status in (0, LEFT) or (not exchange.complete and exchange.gone()):
            exchange.status = LEFT
        seconds = time.perf_counter() - exchange.started
        self.metrics.request(exchange.handler, exchange.method, exchange.status, seconds)
        log = self._access_log
        if log is None:
            return
        route = self._table.get(exchange.path)
        if exchange.status != 200 or route is None or not route.is_quiet:
            log.add(
                Access(
                    time.time(),
                    exchange.id,
                    exchange.method,
                    exchange.path,
                    exchange.status,
                    seconds,
                    exchange.bytes_in,
                    exchange.bytes_out,
                    exchange.client,
                    exchange.handler,
                    exchange.waited_s,
                )
            )

    # for routes of a front

    async def read(self, exchange: Exchange) -> Content:
        """The body of a request, every limit held while reading. Raises HTTPError, ClientLeftError."""
        return await self._bodies.read(exchange) if exchange.has_body else _EMPTY

    # handlers

    async def _infer(self, exchange: Exchange, name: str, backend: Backend) -> None:
        exchange.handler = name
        content = await self.read(exchange)
        scope = exchange.scope
        headers = scope["headers"]
        if self._keys.required:
            headers = [pair for pair in headers if pair[0] != b"authorization"]
        method = "GET" if exchange.method == "HEAD" else exchange.method
        request = Request(
            method,
            exchange.path,
            scope["query_string"],
            headers,
            content.buffer,
            content.form,
            content.files,
            exchange.id,
        )
        call = backend.submit(request, exchange.gone)
        exchange.on_leave(call.cancel)
        try:
            reply = await call.reply()
            exchange.waited_s = call.waited_s
            if call.chunks is None:
                await send_reply(exchange, reply)
            else:
                await self._send_stream(exchange, reply, call, name)
        except BaseException:
            call.cancel()
            raise

    async def _send_stream(self, exchange: Exchange, reply: Reply, call: Call, name: str) -> None:
        assert call.chunks is not None
        is_sse = reply.media_type.startswith("text/event-stream")
        headers = encoded(reply.headers)
        await exchange.begin(reply.status, reply.media_type, [*_SSE_HEADERS, *headers] if is_sse else headers)
        await exchange.stream(call.chunks, is_sse=is_sse, step=lambda: self.metrics.chunk(name))


def submit(request: HTTPRequest, name: str, backend: Backend, work: Request) -> Call:
    """For routes of an app's own: hand work to a handler, counted and dropped when the client leaves.

    The body of `request` must have been read. Raises OverloadedError, which becomes a 503 by itself.
    """
    exchange = exchange_of(request.scope)
    exchange.handler, work.id = name, exchange.id
    call = backend.submit(work, exchange.gone)
    exchange.on_leave(call.cancel)
    return call


async def send_reply(exchange: Exchange, reply: Reply) -> None:
    """A whole answer; an error in the one shape that errors have."""
    headers = encoded(reply.headers) if reply.headers else ()
    if reply.status >= 400 and not reply.body:
        await exchange.whole(reply.status, _JSON, problem.document(reply.status, reply.message, reply.code), headers)
    else:
        await exchange.whole(reply.status, reply.media_type, reply.body, headers)


async def _send_finding(exchange: Exchange, finding: Finding) -> None:
    status, document, headers = finding
    await exchange.whole(status, _JSON, orjson.dumps(document), encoded(headers))


def _cors(origins: tuple[str, ...]) -> CORSMiddleware | None:
    """Starlette's rules for pages of other origins."""
    if not origins:
        return None

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("only the rules of the middleware are used")

    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return CORSMiddleware(nothing, allow_origins=origins, allow_methods=methods, allow_headers=("*",))


def _without_length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0] not in (b"content-length", b"content-type")]
