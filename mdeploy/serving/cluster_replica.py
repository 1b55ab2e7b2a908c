"""One replica on a cluster: the same handler and runner as a local worker's, with Ray in the place of the socket.

It runs in a process that Ray starts on any machine; `Job` and what it yields travel as pickles.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mdeploy.serving import load, worker
from mdeploy.serving.handler import MODEL_VARIABLE, Handler, Request
from mdeploy.serving.info import HandlerInfo
from mdeploy.serving.runner import Event, Runner

FAILED = "mdeploy-start:"
"""Begins the line that says why a replica could not start, among the many that Ray puts around it."""

_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a replica is to run; `overrides` and `config` as `load.describe` takes them.

    `handler` and `paths` are relative to the directory Ray unpacked.
    `model` is a directory that every machine has, or an id that each finds in its own cache, or downloads.
    """

    handler: str
    paths: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model: str = ""
    on_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """A batch is through; `gpu_bytes` is what torch holds on the device."""

    seconds: float
    gpu_bytes: int


def describe(handlers: Sequence[str], paths: Sequence[str]) -> list[str] | str:
    """The handlers of all specs, each as a spec of its own; a text where that cannot be said."""
    found: list[str] = []
    try:
        for spec in handlers:
            where = spec.partition(":")[0]
            found += [f"{where}:{cls.__qualname__}" for cls in load.handlers(spec, _here(paths))]
    except BaseException as error:  # whatever a user's module does is told to whoever asked
        return worker.last_words(error)
    return found


def information(job: Job) -> HandlerInfo | str:
    """What a handler says of itself, its source relative to the parcel; a text where it cannot be used."""
    try:
        (cls,) = load.handlers(job.handler, _here(job.paths))
        info = load.describe(cls, job.overrides, job.config)
        return replace(info, source=os.path.relpath(info.source) if info.source else "")
    except BaseException as error:  # see `describe`
        return worker.last_words(error)


def _here(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(Path(path).absolute()) for path in paths)


class Replica:
    """One handler in a process of Ray's. All of the user's code runs in one thread, one batch at a time."""

    def __init__(self, job: Job) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="handler")
        self._turn = asyncio.Lock()
        self._since: float | None = None
        try:
            self._runner, self._handler, self._info = self._thread.submit(_prepare, job).result()
        except BaseException as error:
            raise RuntimeError(f"{FAILED} {worker.last_words(error)}") from None

    async def run(self, requests: Sequence[Request], replica: str) -> AsyncIterator[Event | Done]:
        """Answer a batch: its events as they happen, then `Done`. `replica` is for the router alone."""
        async with self._turn:
            started = self._since = time.monotonic()
            events = self._runner.run(requests)
            loop = asyncio.get_running_loop()
            try:
                while (event := await loop.run_in_executor(self._thread, next, events, None)) is not None:
                    self._since = time.monotonic()
                    yield event
            finally:  # also where nobody reads any more: what runs in the thread must end before its next batch
                await asyncio.wrap_future(self._thread.submit(_close, events))
                self._since = None
            yield Done(time.monotonic() - started, _gpu_bytes())

    async def check_health(self) -> None:
        """Asked by Ray, which replaces whoever raises: a handler that hangs."""
        if self._since is not None and time.monotonic() - self._since > self._info.timeout + _GRACE_S:
            raise RuntimeError(f"it hung: nothing for {self._info.timeout:g} s")

    def __del__(self) -> None:
        if hasattr(self, "_handler"):
            self._thread.submit(self._handler.close)
            self._thread.shutdown(wait=False)


def _prepare(job: Job) -> tuple[Runner, Handler, HandlerInfo]:
    if job.model:
        os.environ[MODEL_VARIABLE] = _model(job.model)
    (cls,) = load.handlers(job.handler, _here(job.paths))
    info = load.describe(cls, job.overrides, job.config)
    handler = cls()
    handler.init("cuda:0" if job.on_gpu else "cpu")
    runner = Runner(handler, info)
    if info.example is not None:
        worker.warm_up(runner, info)
    return runner, handler, info


def _model(named: str) -> str:
    """The directory of a model on this machine. Raises LoadError."""
    if Path(named).is_absolute():
        if not Path(named).is_dir():
            raise load.LoadError(f"there is no model directory {named} on {os.uname().nodename}")
        return named
    done = subprocess.run(
        [sys.executable, "-m", "mdeploy", "download", named, "--json"], capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {"error": {"message": done.stderr.strip() or "mdeploy download failed"}}
    if "path" not in found:
        raise load.LoadError(f"{named} on {os.uname().nodename}: {found['error']['message']}")
    return str(found["path"])


def _gpu_bytes() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.memory_reserved()) if torch is not None and torch.cuda.is_initialized() else 0


def _close(events: Any) -> None:
    """End a generator; one that is still at work ends itself."""
    close = getattr(events, "close", None)
    if close:
        close()
