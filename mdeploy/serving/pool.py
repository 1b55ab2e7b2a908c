"""The local workers of one handler: one process per device and slot, replaced when it dies, hangs or is outdated."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mdeploy.serving import answers
from mdeploy.serving.backend import Observer
from mdeploy.serving.dispatch import Dispatched, Dispatcher
from mdeploy.serving.info import HandlerInfo, WorkerState
from mdeploy.serving.process import StartError, WorkerProcess
from mdeploy.serving.worker import Job

Say = Callable[[str], None]

_TICK_S = 1.0
_BACK_OFF_S = (0.5, 30.0)
_FAILED_STARTS = 5
"""Replacements that fail in a row, while no worker is left, before the service gives up."""

_START_FACTOR, _START_S = 5.0, 600.0
"""A replacement may take so many times as long as the first start, and always so many seconds."""

_RETIRE_S = 600.0
"""What an old worker gets to finish streams that go on; one that makes no progress is killed long before."""

_END_S = 5.0
"""What a worker gets to close its model and end."""

_FIXED = ("name", "path", "aliases", "methods", "queue_size", "workers_per_device", "body", "result")
"""What a service keeps for as long as it lives, whatever fresh workers say."""

_PRIVATE = ("MDEPLOY_API_KEYS_FILE", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What the workers of one handler are. `devices` are GPU indices or `cpu`; `threads` are those of one worker.

    `env` is added to their environment. `overrides` win over the class's attributes, `config` (by handler name) over
    both.
    """

    spec: str
    python: str
    paths: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    threads: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    adopt: Callable[[HandlerInfo], HandlerInfo] = lambda info: info


@dataclass(slots=True)
class _Slot:
    """A place for a worker; `index` numbers those of one device. Whoever puts another one there holds the lock."""

    device: str
    index: int
    worker: WorkerProcess
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    keeper: asyncio.Task[None] | None = None


class Pool(Dispatched):
    """All workers of one handler (a Backend)."""

    def __init__(self, options: PoolOptions, observer: Observer, say: Say) -> None:
        self._options, self._observer, self._say = options, observer, say
        self._loop = asyncio.get_running_loop()
        self._slots: list[_Slot] = []
        self._retiring: list[WorkerProcess] = []
        self._generation = 1
        self._failed_starts = 0
        self._start_limit_s = _START_S
        self._retirements: set[asyncio.Task[None]] = set()
        self._closing = False
        self._ticker: asyncio.TimerHandle | None = None
        self.broken: asyncio.Future[str] = self._loop.create_future()

    # Backend

    def workers(self) -> tuple[WorkerState, ...]:
        """Every worker there is."""
        return tuple(worker.state() for worker in (*(slot.worker for slot in self._slots), *self._retiring))

    # start

    async def start(self) -> None:
        """Until every worker has answered its example. Raises StartError, with none of them left."""
        begun = self._loop.time()
        try:
            first = self._new(self._options.devices[0], 0)
            info = self._options.adopt(await first.worker.described)
            self._dispatcher = Dispatcher(info, self._observer)
            places = [(d, i) for d in self._options.devices for i in range(info.workers_per_device)]
            for device, index in places[1:]:
                self._new(device, index)
            for ready in asyncio.as_completed([slot.worker.ready for slot in self._slots]):
                await ready
        except BaseException:
            await self._kill_all()
            raise
        self._start_limit_s = max(_START_S, _START_FACTOR * (self._loop.time() - begun))
        for slot in self._slots:
            self._admit(slot.worker)
            self._watch(slot)
        self._learn()
        self._tick()

    def _new(self, device: str, index: int) -> _Slot:
        slot = _Slot(device, index, self._spawn(device))
        self._slots.append(slot)
        return slot

    def _spawn(self, device: str) -> WorkerProcess:
        options = self._options
        on = "cpu" if device == "cpu" else "cuda:0"
        job = Job(options.spec, on, options.paths, options.overrides, options.config)
        try:
            return WorkerProcess(job, options.python, self._environment(device), self._generation)
        except OSError as error:
            raise StartError(f"cannot run {options.python}: {error.strerror}") from error

    def _environment(self, device: str) -> dict[str, str]:
        """Ours, with one GPU or none, its share of the cores, and no secrets of the edge."""
        env = {**open_environment(), **self._options.env}
        env["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        if self._options.threads:
            env.update({name: env.get(name, str(self._options.threads)) for name in _THREADS})
        return env

    def _learn(self) -> None:
        """What workers measured when they loaded their model: a batch has to suit the smallest of them."""
        infos = [slot.worker.ready.result() for slot in self._slots if slot.worker.accepts]
        cost = min((info.max_batch_cost for info in infos if info.max_batch_cost is not None), default=None)
        self._dispatch.info = dataclasses.replace(self.info, max_batch_cost=cost, facts=infos[0].facts)

    def _admit(self, worker: WorkerProcess) -> None:
        worker.listener = self._dispatch
        worker.accepts = True
        self._dispatch.add(worker)
        worker.gone.add_done_callback(lambda _: self._dispatch.lost(worker))

    # life

    def _watch(self, slot: _Slot) -> None:
        """Keep a slot with the worker that is there now; the lock is ours, so nobody is replacing it."""
        if slot.keeper is not None:
            slot.keeper.cancel()
        slot.keeper = self._loop.create_task(self._keep(slot))

    async def _keep(self, slot: _Slot) -> None:
        """Whenever the worker of a slot is gone, put another one there."""
        while True:
            worker = slot.worker
            how = await asyncio.shield(worker.gone)
            if self._closing:
                return
            async with slot.lock:
                if slot.worker is worker:
                    self._say(f"worker {worker.pid} of {self.info.name} on {slot.device}: {how}; starting another")
                    self._observer.restarted(self.info.name, "hang" if worker.killed_for else "crash")
                    if not await self._replace(slot):
                        return

    async def _replace(self, slot: _Slot) -> bool:
        """Start until one is ready; False where that is given up: starts fail, and no worker is left."""
        while not self._closing:
            try:
                slot.worker = self._spawn(slot.device)
                await self._is_ready(slot.worker)
            except StartError as error:
                await asyncio.shield(slot.worker.gone)
                self._failed_starts += 1
                self._observer.restarted(self.info.name, "startup")
                if self._failed_starts >= _FAILED_STARTS and not any(s.worker.accepts for s in self._slots):
                    self._break(str(error))
                    return False
                low, high = _BACK_OFF_S
                pause = min(high, low * 2.0 ** min(self._failed_starts - 1, 30))
                self._say(f"a worker of {self.info.name} did not start: {error}; again in {pause:g} s")
                await asyncio.sleep(pause)
            else:
                self._failed_starts = 0
                self._admit(slot.worker)
                self._learn()
                return True
        return False

    async def _is_ready(self, worker: WorkerProcess) -> None:
        """Wait for a replacement, and not for ever. Raises StartError."""
        try:
            await asyncio.wait_for(asyncio.shield(worker.ready), self._start_limit_s)
        except asyncio.TimeoutError as error:
            worker.kill("it did not start in time")
            raise StartError(f"it was not ready after {self._start_limit_s:.0f} s") from error

    def _break(self, why: str) -> None:
        if not self.broken.done():
            self.broken.set_result(f"no worker of {self.info.name} starts any more: {why}")

    def _tick(self) -> None:
        for worker in (*(slot.worker for slot in self._slots), *self._retiring):
            worker.tick(self.info.timeout)
        self._ticker = self._loop.call_later(_TICK_S, self._tick)

    # rolling restart

    async def renew(self) -> None:
        """Replace every worker, one after the other, each before it retires. Raises StartError: the rest go on."""
        self._generation += 1
        for slot in self._slots:
            async with slot.lock:
                old = await self._renew_slot(slot)
            retirement = self._loop.create_task(self._retire(old))
            self._retirements.add(retirement)
            retirement.add_done_callback(self._retirements.discard)

    async def _renew_slot(self, slot: _Slot) -> WorkerProcess:
        """Put a fresh worker into a slot; returns the one from before."""
        fresh = self._spawn(slot.device)
        try:
            await self._is_ready(fresh)
        except BaseException:
            await _killed(fresh)
            raise
        self._adopt(self._options.adopt(fresh.ready.result()))
        old, slot.worker = slot.worker, fresh
        self._admit(fresh)
        self._learn()
        self._watch(slot)
        self._observer.restarted(self.info.name, "rolling")
        return old

    def _adopt(self, info: HandlerInfo) -> None:
        """What a fresh class says of itself, but for what the edge and the queue were built with."""
        kept = {name: getattr(self.info, name) for name in _FIXED}
        changed = [name for name in _FIXED if getattr(info, name) != kept[name]]
        if changed:
            self._say(f"{self.info.name} has another {', '.join(changed)} now; that takes a whole restart (--hard)")
        self._dispatch.info = dataclasses.replace(info, **kept)

    async def _retire(self, worker: WorkerProcess) -> None:
        """Let a worker finish what it has, then end it."""
        self._retiring.append(worker)
        worker.end()
        deadline, was_idle = self._loop.time() + _RETIRE_S, False
        try:
            while not (await asyncio.wait({worker.gone}, timeout=_END_S))[0]:
                if was_idle or self._loop.time() > deadline:
                    await _killed(worker)
                was_idle = not worker.outstanding
        finally:
            self._retiring.remove(worker)

    # end

    async def close(self) -> None:
        """End all workers. What still waits is answered 503: whoever wants it answered drains before."""
        if self._dispatcher is not None:
            self._dispatcher.fail_all(answers.refusal(503, "the service is stopping", "stopping"))
        self._closing = True
        if self._ticker:
            self._ticker.cancel()
        for slot in self._slots:
            slot.worker.end()
        gone = [worker.gone for worker in (*(slot.worker for slot in self._slots), *self._retiring)]
        if gone:
            await asyncio.wait(gone, timeout=_END_S)
        await self._kill_all()
        for task in (*filter(None, (slot.keeper for slot in self._slots)), *self._retirements):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _kill_all(self) -> None:
        for worker in (*(slot.worker for slot in self._slots), *self._retiring):
            await _killed(worker)


def open_environment() -> dict[str, str]:
    """Our environment as a user's code may see it."""
    return {name: value for name, value in os.environ.items() if name not in _PRIVATE}


async def _killed(worker: WorkerProcess) -> None:
    worker.kill("it was told to end")
    await asyncio.shield(worker.gone)
