"""How a service is: /health tells whether workers live, /ready whether a model really answered lately.

Both return (status, document, headers); neither knows HTTP. Nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from mdeploy.serving.backend import Backend, OverloadedError

FRESH_S = 30.0
"""An answer this old still shows that the model works."""

Extra = Callable[[], Mapping[str, Any]]
Finding = tuple[int, dict[str, Any], tuple[tuple[str, str], ...]]

_LIVE = ("ready", "busy")


def health(backends: Mapping[str, Backend], extra: Extra | None = None, *, has_paths: bool = True) -> Finding:
    """200 while every handler has a worker that lives, else 503. `extra` is what the caller adds to the document.

    `has_paths` says that clients reach each handler by its path.
    """
    paths = {name: {"path": backend.info.path} if has_paths else {} for name, backend in backends.items()}
    handlers = {name: {**paths[name], **_shown(backend)} for name, backend in backends.items()}
    is_well = all(_lives(backend) for backend in backends.values())
    document = {"status": "ok" if is_well else "unavailable", "handlers": handlers, **(extra() if extra else {})}
    headers = () if is_well else (("Retry-After", "1"),)  # workers are on their way: the supervisor shall wait
    return (200 if is_well else 503), document, headers


def _shown(backend: Backend) -> dict[str, Any]:
    workers = [dataclasses.asdict(worker) for worker in backend.workers()]
    return {
        "live": _lives(backend),
        "queued": backend.queued,
        "in_flight": backend.in_flight,
        "workers": workers,
    }


def _lives(backend: Backend) -> bool:
    return any(worker.state in _LIVE for worker in backend.workers())


class Readiness:
    """Asks a handler for its example where nobody else asked it lately; those who ask at once share one answer."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._proven: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[tuple[int, str]]] = {}

    async def ready(self) -> Finding:
        """200 once every handler answered; 422 where one refuses its own example; 503 otherwise."""
        found = await asyncio.gather(*map(self._of, self._backends))
        document = {
            name: {"ready": status == 200, **({"error": error} if error else {})}
            for name, (status, error) in zip(self._backends, found, strict=True)
        }
        status = max((status for status, _ in found), default=200)
        headers = (("Retry-After", "1"),) if status == 503 else ()
        return status, {"status": "ready" if status == 200 else "not ready", "handlers": document}, headers

    async def _of(self, name: str) -> tuple[int, str]:
        backend = self._backends[name]
        if not _lives(backend):
            return 503, "no worker is ready"
        if backend.info.example is None:
            return 200, ""
        proven = max(backend.answered_at, self._proven.get(name, 0.0))
        if proven and time.monotonic() - proven < FRESH_S:
            return 200, ""
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.get_running_loop().create_task(self._ask(name, backend))
            asking.add_done_callback(lambda _: self._asking.pop(name))
        return await asyncio.shield(asking)

    async def _ask(self, name: str, backend: Backend) -> tuple[int, str]:
        """One inference, or the first part of a streamed one."""
        assert backend.info.example is not None
        try:
            call = backend.submit(backend.info.example, lambda: False)
        except OverloadedError as error:
            return 503, str(error)
        reply = await call.reply()
        if call.chunks is not None:
            call.cancel()
        if reply.status < 400:
            self._proven[name] = time.monotonic()
            return 200, ""
        return (422 if reply.status < 500 else 503), f"its example was answered {reply.status}: {reply.message}"
