"""A served edge whose handlers run inside its own process: HTTP alone is on trial.

`python -m tests.fakes.edge '{"port": …, …}'`: the document's keys are fields of EdgeOptions and ConnectionLimits, and
`keys`, a file. Handlers: /echo (the body), /form (what a form held), /slow (answers after `?s=`), /stream and /broken
(`n` events of `size`, then the end, or an error), /raw and /rawbroken (the same as bytes), /full (always overloaded),
/fails (500). What reached a handler stands in /seen.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request as HTTPRequest

from mdeploy.serving.auth import Keys
from mdeploy.serving.backend import OverloadedError, StreamError
from mdeploy.serving.handler import HTTPError, Request
from mdeploy.serving.info import HandlerInfo, Reply, WorkerState

JSON = "application/json"


class Call:
    """One request, answered in a task where the answer takes time."""

    def __init__(self, backend: Local, request: Request) -> None:
        self._backend, self._request = backend, request
        self.chunks: AsyncIterator[bytes] | None = None
        self.waited_s = 0.0
        self.is_cancelled = False
        self._task: asyncio.Task[Reply] | None = None

    async def reply(self) -> Reply:
        self._task = asyncio.create_task(self._backend.answer(self, self._request))
        reply = await self._task
        self._backend.answered_at = time.monotonic()
        return reply

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self._backend.cancelled += 1
            if self._task is not None:
                self._task.cancel()


class Local:
    """A backend that needs no workers."""

    def __init__(self, name: str, answer: Callable[[Call, Request], Any], **info: Any) -> None:
        self.info = HandlerInfo(name, f"/{name}", **info)
        self._answer = answer
        self.queued = self.in_flight = self.submitted = self.cancelled = 0
        self.answered_at = 0.0
        self.state: Any = "ready"

    async def answer(self, call: Call, request: Request) -> Reply:
        reply: Reply = await self._answer(call, request)
        return reply

    def submit(self, request: Request, gone: Callable[[], bool], cost: float = 0.0) -> Call:
        self.submitted += 1
        if self.info.name == "full":
            raise OverloadedError(1.5)
        return Call(self, request)

    def workers(self) -> tuple[WorkerState, ...]:
        return (WorkerState(os.getpid(), "cpu", 1, self.state),)


async def echo(call: Call, request: Request) -> Reply:
    return Reply(200, "application/octet-stream", request.buffer)


async def form(call: Call, request: Request) -> Reply:
    files = [(f.field, f.name, f.type, len(f.data)) for f in request._files]
    found = {"form": list(request.form.items()), "files": files, "body": len(request.body)}
    return Reply(200, JSON, json.dumps(found).encode())


async def slow(call: Call, request: Request) -> Reply:
    await asyncio.sleep(float(request.query["s"]))
    return Reply(200, JSON, b'"done"')


async def _events(count: int, size: int, *, fails: bool, sse: bool) -> AsyncIterator[bytes]:
    padding = b" " * size
    for number in range(count):
        await asyncio.sleep(0)
        yield b"data: %d%b\n\n" % (number, padding) if sse else b"%d;" % number
    if fails:
        raise StreamError("the model fell over")


def _streaming(media_type: str, *, fails: bool) -> Callable[[Call, Request], Any]:
    async def answer(call: Call, request: Request) -> Reply:
        count, size = int(request.query.get("n", "3")), int(request.query.get("size", "0"))
        call.chunks = _events(count, size, fails=fails, sse="event" in media_type)
        return Reply(200, media_type)

    return answer


async def fails(call: Call, request: Request) -> Reply:
    return Reply(500, JSON, b"", (), "internal_error", "the model failed")


def backends() -> dict[str, Local]:
    """Fresh ones of every kind."""
    example = Request(headers=[(b"content-type", b"application/json")], body=b'{"text": "hi"}')
    found = [
        Local("echo", echo, aliases=("/also",), example=example, doc="Echo.\nMore of it.", streams=False),
        Local("form", form),
        Local("slow", slow),
        Local("stream", _streaming("text/event-stream", fails=False), streams=True),
        Local("broken", _streaming("text/event-stream", fails=True), streams=True),
        Local("raw", _streaming("application/octet-stream", fails=False), streams=True, streamed_as="raw"),
        Local("rawbroken", _streaming("application/octet-stream", fails=True), streams=True, streamed_as="raw"),
        Local("full", echo),
        Local("fails", fails, methods=("POST",)),
    ]
    return {each.info.name: each for each in found}


async def serve(document: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    from mdeploy.serving import httpd
    from mdeploy.serving.edge import EdgeOptions, create_app, submit
    from mdeploy.serving.httpd_connection import ConnectionLimits
    from mdeploy.serving.metrics import Metrics

    def fields(kind: Any) -> dict[str, Any]:
        return {f.name: document[f.name] for f in dataclasses.fields(kind) if f.name in document}

    there, stopping = backends(), asyncio.Event()
    keys = Keys(Path(document["keys"]) if "keys" in document else None)
    edge = EdgeOptions(**{**fields(EdgeOptions), **({"index": Path(document["index"])} if "index" in document else {})})
    app = create_app(there, edge, keys, Metrics(), title="on trial")

    async def seen() -> Any:
        return {name: {"submitted": b.submitted, "cancelled": b.cancelled} for name, b in there.items()}

    async def own(request: HTTPRequest) -> Any:
        body = await request.body()
        reply = await submit(request, "echo", there["echo"], Request(body=body)).reply()
        return {"length": len(bytes(reply.body))}

    async def typed(number: int) -> Any:
        return number

    async def crash() -> Any:
        raise RuntimeError("secret detail")

    async def teapot() -> Any:
        raise HTTPError(418, "short and stout", code="teapot")

    app.add_api_route("/seen", seen)
    app.add_api_route("/own", own, methods=["POST"])
    app.add_api_route("/typed", typed)
    app.add_api_route("/crash", crash)
    app.add_api_route("/teapot", teapot)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keys.reload)
    sock = httpd.bind("127.0.0.1", document["port"])
    options = httpd.ServerOptions(document.get("drain_s", 5.0), limits=ConnectionLimits(**fields(ConnectionLimits)))
    await httpd.serve(app, sock, options, stopping)


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(json.loads(sys.argv[1])))
