"""The controller of modelserve scripts: our edge, with workers in other processes and machines behind it.

It never runs a model. Keys, limits, metrics, logs, /health, /docs and the page at / are those of every app.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdeploy.compat import forward, registrar
from mdeploy.compat.fleet import Fleet, Worker
from mdeploy.errors import ConfigError, MdeployError
from mdeploy.serving import load
from mdeploy.serving.auth import Keys
from mdeploy.serving.info import HandlerInfo

if TYPE_CHECKING:
    import httpx

_CHECK_EVERY_S = 1.0
_CHECK_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Terms:
    """Where a controller listens, its page, and the origins whose pages may ask it."""

    host: str
    port: int
    page: Path | None
    cors: tuple[str, ...] = ()


def run(terms: Terms, apis: Mapping[str, type], keys: Keys, token: str, say: Callable[[str], None]) -> int:
    """Serve until TERM or INT; returns the exit status. Raises MdeployError where it cannot start."""
    import uvloop

    return int(uvloop.run(_Controller(terms, _describe(apis), keys, token, say).run()))


def _describe(apis: Mapping[str, Any]) -> dict[str, HandlerInfo]:
    try:
        infos = [load.describe(cls.__mdeploy_handler__) for cls in apis.values()]
    except load.LoadError as error:
        raise ConfigError(str(error), hint="mend the class and start again") from error
    if any(info.path == registrar.PATH for info in infos):
        raise ConfigError(f"{registrar.PATH} is the controller's own", hint="give the class another name in @api")
    return {info.name: info for info in infos}


class _Controller:
    """One controller while it runs."""

    def __init__(
        self, terms: Terms, infos: Mapping[str, HandlerInfo], keys: Keys, token: str, say: Callable[[str], None]
    ) -> None:
        self._terms, self._infos, self._keys, self._token, self._say = terms, infos, keys, token, say
        self._fleet = Fleet(time.monotonic)
        self._stopping = asyncio.Event()
        self._alarm = asyncio.Event()

    async def run(self) -> int:
        from mdeploy.serving import httpd

        self._on_signals()
        with httpd.bind(self._terms.host, self._terms.port) as sock:
            async with forward.client() as http:
                app = self._app(http)
                watching = asyncio.create_task(self._watch(http))
                self._say(f"the controller of {', '.join(self._infos)} listens on port {self._terms.port}")
                try:
                    await httpd.serve(app, sock, httpd.ServerOptions(), self._stopping)
                finally:
                    watching.cancel()
                    await asyncio.wait({watching})
        return 0

    def _app(self, http: httpx.AsyncClient) -> registrar.Registrar:
        from mdeploy.serving.edge import EdgeOptions, create_app
        from mdeploy.serving.metrics import Metrics

        metrics = Metrics()
        workers = forward.Workers(self._fleet, http, self._token, self._alarm)
        backends = {name: forward.RemoteBackend(info, workers, metrics) for name, info in self._infos.items()}
        options = EdgeOptions(cors=self._terms.cors, index=self._terms.page)
        app = create_app(backends, options, self._keys, metrics, title=", ".join(self._infos))
        return registrar.Registrar(app, self._fleet, self._infos, self._token, self._alarm.set)

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_keys)

    def _reload_keys(self) -> None:
        try:
            self._keys.reload()
            self._say("read the API keys again")
        except MdeployError as error:
            self._say(f"{error.message}; the keys from before stay")

    # workers

    async def _watch(self, http: httpx.AsyncClient) -> None:
        """Check new, suspected and silent workers, at once where one joined or failed."""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._alarm.wait(), _CHECK_EVERY_S)
            self._alarm.clear()
            await asyncio.gather(*(self._check(http, worker) for worker in self._fleet.due()))

    async def _check(self, http: httpx.AsyncClient, worker: Worker) -> None:
        before = worker.is_up
        self._fleet.checked(worker, is_healthy=await _is_healthy(http, worker))
        if worker.is_up != before:
            self._say(f"worker {worker.address} of {worker.name} {'is in' if worker.is_up else 'is out of'} rotation")


async def _is_healthy(http: httpx.AsyncClient, worker: Worker) -> bool:
    import httpx

    try:
        return (await http.get(f"{worker.address}/health", timeout=_CHECK_TIMEOUT_S)).status_code == 200
    except httpx.HTTPError:
        return False
