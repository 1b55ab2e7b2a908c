"""A service of handler classes: one edge and, for each handler, a pool of workers, in one event loop.

Signals: TERM and INT drain and end, HUP reads the API keys again, USR1 replaces every worker by a fresh one before
it retires (`mdeploy restart`). Lines of our own begin with `mdeploy-app:`; the supervisor reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mdeploy.errors import ConfigError, ExitCode, MdeployError
from mdeploy.serving import load
from mdeploy.serving.auth import KEYS_VARIABLE, Keys
from mdeploy.serving.backend import Backend
from mdeploy.serving.info import HandlerInfo
from mdeploy.serving.metrics import Metrics
from mdeploy.serving.options import AppOptions
from mdeploy.serving.pool import Pool, PoolOptions, open_environment
from mdeploy.serving.process import StartError, list_handlers

if TYPE_CHECKING:
    from mdeploy.serving.edge import MakeFront, Service

_OVERRIDES = ("workers_per_device", "max_batch_size", "max_batch_cost", "max_wait_ms", "timeout", "queue_size")


def say(text: str) -> None:
    """A line for the log of the service."""
    with contextlib.suppress(OSError):  # the log's disk may be full: serving goes on
        print(f"mdeploy-app: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the workers of one handler run; None leaves it to the options of the service. `env` is for them alone.

    A helper has limits of its own: what users say of theirs (timeout, batches) is about the model.
    """

    spec: str
    devices: tuple[str, ...] | None = None
    workers_per_device: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    is_helper: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """What one of our own apps is made of: its handlers, what clients see in front of them, and its page."""

    places: tuple[Place, ...]
    front: MakeFront
    index: Path | None = None


def main(options: AppOptions, kind: Kind | None = None) -> int:
    """Serve until told to end; returns the exit status. Raises MdeployError where it cannot start."""
    import uvloop

    return uvloop.run(App(options, kind).run())


class Workers(Protocol):
    """Whatever runs the handlers of a service: local pools, or a cluster."""

    broken: asyncio.Future[str]

    @property
    def backends(self) -> Mapping[str, Backend]:
        """Each handler by its name."""

    async def restart(self) -> None:
        """Replace all workers, each before it retires. Raises StartError."""

    async def close(self) -> None:
        """End all of them."""


class App:
    """One service while it runs: a user's handlers, or an app of our own."""

    def __init__(self, options: AppOptions, kind: Kind | None = None) -> None:
        self._options, self._kind = options, kind
        self._metrics = Metrics()
        file = os.environ.get(KEYS_VARIABLE)
        self._keys = Keys(Path(file) if file else None)
        self._stopping = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None
        self._renew_again = False
        self._workers: Workers | None = None
        self._restart: asyncio.Task[None] | None = None
        self.rolling: dict[str, str | int | None] = {"state": "idle", "error": None, "round": 0}

    async def run(self) -> int:
        """See `main`."""
        from mdeploy.serving import httpd

        self._on_signals()
        with httpd.bind(self._options.host, self._options.port) as sock:
            self._workers = await self._unless_stopped()
            if self._workers is None:
                return ExitCode.OK
            try:
                return await self._serve(sock, self._workers)
            finally:
                if self._renewal is not None:
                    self._renewal.cancel()
                await self._workers.close()

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_keys)
        loop.add_signal_handler(signal.SIGUSR1, self.renew)

    async def _unless_stopped(self) -> Workers | None:
        """Start the workers; None where we were told to end meanwhile."""
        start = asyncio.create_task(self._start())
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.cancel():
            return await start
        start.cancel()
        await asyncio.wait({start})
        if not start.cancelled() and start.exception() is None:  # it was through at the same moment
            await start.result().close()
        return None

    async def _start(self) -> Workers:
        if self._options.cluster is not None:
            from mdeploy.serving import cluster

            return await cluster.connect(self._options, self._metrics, say)
        pools = LocalPools(self._options, self._metrics, self._kind.places if self._kind else ())
        try:
            await pools.start()
        except StartError as error:
            raise MdeployError(str(error)) from error
        return pools

    async def _serve(self, sock: socket.socket, workers: Workers) -> int:
        from mdeploy.serving import httpd

        app = self._edge(workers)
        server_options = httpd.ServerOptions(drain_s=self._options.drain_s)
        server = asyncio.create_task(httpd.serve(app, sock, server_options, self._stopping))
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again
        say(f"listening on {self._options.host}:{self._options.port}")
        if self._renew_again:
            self.renew()
        reloader = asyncio.create_task(self._watch(workers)) if self._options.reload else None
        ends: set[asyncio.Future[Any]] = {server, workers.broken}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if reloader is not None:
            reloader.cancel()
        if not workers.broken.done():
            await server
            return ExitCode.OK
        say(f"error: {workers.broken.result()}")
        self._stopping.set()
        await server
        return ExitCode.FAILURE

    def _edge(self, workers: Workers) -> Service:
        """What answers for the workers. Raises ConfigError."""
        from mdeploy.serving import edge

        options, kind = self._options, self._kind
        at_edge = edge.EdgeOptions(
            max_body_bytes=options.max_body_bytes,
            cors=options.cors,
            access_log=options.access_log,
            index=kind.index if kind else _index(backend.info for backend in workers.backends.values()),
        )
        extra = lambda: {"rolling": self.rolling}  # noqa: E731 one value, of this moment
        return edge.create_app(
            workers.backends,
            at_edge,
            self._keys,
            self._metrics,
            title=options.service,
            health_extra=extra,
            front=kind.front if kind else None,
        )

    # while it runs

    def _reload_keys(self) -> None:
        try:
            self._keys.reload()
            say("read the API keys again")
        except ConfigError as error:
            say(f"{error.message}; the keys from before stay")

    def renew(self) -> None:
        """Replace all workers, anew where that is going on already: who waits for old code to load waits in vain."""
        if self._renewal is not None and not self._renewal.done():
            self._renew_again = True
            if self._restart is not None and self._options.cluster is None:
                self._restart.cancel()
        elif self._workers is None:
            self._renew_again = True  # they are starting, perhaps with the code from before
        else:
            self._renewal = asyncio.create_task(self._renew(self._workers))

    async def _renew(self, workers: Workers) -> None:
        self._renew_again = True
        for number in itertools.count(int(self.rolling["round"] or 0) + 1):
            if not self._renew_again:
                return
            self._renew_again = False
            self.rolling.update(state="running", error=None, round=number)
            say("replacing the workers, one after the other")
            self._restart = asyncio.create_task(workers.restart())
            try:
                await asyncio.wait({self._restart})
            finally:
                self._restart.cancel()
            if not self._restart.cancelled():
                self._conclude(self._restart)

    def _conclude(self, restart: asyncio.Task[None]) -> None:
        try:
            restart.result()
        except StartError as error:
            say(f"the new worker did not start: {error}; the old ones go on")
            self.rolling.update(state="failed", error=str(error))
        else:
            say("all workers are replaced")
            self.rolling.update(state="idle")

    async def _watch(self, workers: Workers) -> None:
        """Renew whenever a Python file beside a handler changes (--reload)."""
        import watchfiles

        infos = [backend.info for backend in workers.backends.values()]
        directories = {str(Path(info.source).parent) for info in infos if info.source} | set(self._options.paths)
        say(f"reloading at every change below {', '.join(sorted(directories))}")
        try:
            async for changes in watchfiles.awatch(*directories, watch_filter=watchfiles.PythonFilter()):
                say(f"{', '.join(sorted({Path(file).name for _, file in changes}))} changed")
                self.renew()
        except (OSError, RuntimeError) as error:  # no inotify watches left, for one
            say(f"changes are not noticed any more: {error}; `mdeploy restart` takes them over")


class LocalPools:
    """A pool of worker processes for each handler: those of `places`, else those that the options name."""

    def __init__(self, options: AppOptions, metrics: Metrics, places: tuple[Place, ...] = ()) -> None:
        self._options, self._metrics, self._places = options, metrics, places
        self._pools: tuple[Pool, ...] = ()
        self.backends: Mapping[str, Backend] = {}
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Start them all, at once. Raises StartError or ConfigError, with nothing left running."""
        places = self._places or tuple(map(Place, await self._specs()))
        say(f"starting {len(places)} handler{'s' * (len(places) > 1)} on {', '.join(self._options.devices)}")
        models = sum(not place.is_helper for place in places)
        self._pools = tuple(Pool(self._pool_options(place, models), self._metrics, say) for place in places)
        starts = [asyncio.create_task(pool.start()) for pool in self._pools]
        try:
            await asyncio.gather(*starts)
            _check([pool.info for pool in self._pools], self._options.config)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.wait(starts)
            await self.close()
            raise
        self.backends = {pool.info.name: pool for pool in self._pools}
        for pool in self._pools:
            pool.broken.add_done_callback(self._break)

    def _break(self, broken: asyncio.Future[str]) -> None:
        if not broken.cancelled() and not self.broken.done():
            self.broken.set_result(broken.result())

    async def _specs(self) -> tuple[str, ...]:
        """One spec a handler; a whole module is asked for its classes."""
        found: list[str] = []
        for spec in self._options.handlers:
            if ":" in spec:
                found.append(spec)
            else:
                say(f"looking for handlers in {spec}")
                found += await list_handlers(self._python, spec, self._options.paths, open_environment())
        return tuple(dict.fromkeys(found))

    @property
    def _python(self) -> str:
        return self._options.python or sys.executable

    def _pool_options(self, place: Place, handlers: int) -> PoolOptions:
        options = self._options
        devices = place.devices or options.devices
        wished = {name: getattr(options, name) for name in _OVERRIDES if getattr(options, name) is not None}
        overrides = {} if place.is_helper else wished
        if place.workers_per_device is not None:
            overrides["workers_per_device"] = place.workers_per_device
        workers = handlers * len(devices) * (overrides.get("workers_per_device") or 1)

        def adopt(info: HandlerInfo) -> HandlerInfo:
            return load.with_service(info, options.service) if handlers == 1 and not self._places else info

        return PoolOptions(
            place.spec,
            self._python,
            options.paths,
            devices,
            overrides,
            options.config,
            threads=max(1, len(os.sched_getaffinity(0)) // workers),
            env=place.env,
            adopt=adopt,
        )

    async def restart(self) -> None:
        """See `Workers`."""
        for pool in self._pools:
            await pool.renew()

    async def close(self) -> None:
        """See `Workers`."""
        await asyncio.gather(*(pool.close() for pool in self._pools))


def _index(infos: Iterable[HandlerInfo]) -> Path | None:
    """The page beside the first handler's file that has one."""
    pages = (Path(info.source).with_name("index.html") for info in infos if info.source)
    return next((page for page in pages if page.is_file()), None)


def _check(infos: Sequence[HandlerInfo], config: Iterable[str]) -> None:
    """Handlers must not stand in each other's way, and what is configured must be there. Raises ConfigError."""
    names = Counter(info.name for info in infos)
    paths = Counter(path for info in infos for path in {info.path, *info.aliases})
    for what, counted in (("name", names), ("path", paths)):
        twice = sorted(value for value, count in counted.items() if count > 1)
        if twice:
            hint = f"give one of them another `{what}`"
            raise ConfigError(f"several handlers have the {what} {', '.join(twice)}: {hint}", hint=hint)
    unknown = sorted(set(config) - names.keys() - {Path(info.path).name for info in infos})
    if unknown:
        raise ConfigError(f"`config` names {', '.join(unknown)}, the handlers are {', '.join(sorted(names))}")
