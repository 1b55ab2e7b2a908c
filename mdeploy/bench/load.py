"""Runs a `LoadPlan`: starts the workers, lets them go together, gathers what they measured.

The parent does nothing while they work but read a line of counts now and then. However it ends,
also by SIGKILL, the workers end with it: their stdin is a pipe that only it holds.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdeploy
from mdeploy.bench import plan as planning
from mdeploy.bench.types import BenchProgress, LoadPlan
from mdeploy.bench.wire import GO, Frames, Job, Tick, WorkerReport, frame
from mdeploy.errors import MdeployError

OnProgress = Callable[[BenchProgress], None]

_READY_S = 60.0
_STOP_S = 10.0
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all workers brought home."""

    reports: tuple[WorkerReport, ...]
    interrupted: bool


class _Child:
    """One worker process and its two pipes."""

    def __init__(self, job: Job) -> None:
        # Run from where the package lies, so that no file in the user's directory shadows a module.
        home = Path(mdeploy.__file__).parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mdeploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=home,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.frames = Frames()
        self.ready = False
        self.tick = Tick(0, 0, 0, 0)
        self.report: WorkerReport | None = None
        self.say(frame(job))

    def say(self, data: bytes) -> None:
        """Write to the worker; that it died shows on the other pipe."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(data)
            self.stdin.flush()

    def stop(self) -> None:
        """Tell it to finish at once and report."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()

    def hear(self) -> None:
        """Take what it wrote. Raises MdeployError when it died without a report."""
        data = os.read(self.stdout.fileno(), _READ_BYTES)
        if not data and self.report is None:
            code = self.process.wait(_STOP_S)
            raise MdeployError(f"a load worker died (exit status {code})", hint="its message is above")
        for message in self.frames.feed(data):
            self._take(message)

    def _take(self, message: Any) -> None:
        if isinstance(message, Tick):
            self.tick = message
        elif isinstance(message, WorkerReport):
            self.report = message
        else:
            self.ready = True

    def end(self) -> None:
        """Make sure that it is gone."""
        self.stop()
        if self.report is None:
            self.process.kill()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stdout.close()


def run(plan: LoadPlan, on_progress: OnProgress | None = None) -> Outcome:
    """Put the load on the server. An interrupt ends it early and keeps what was measured.

    Raises MdeployError when a worker dies.
    """
    children: list[_Child] = []
    try:
        for job in planning.jobs(plan):
            children.append(_Child(job))
        interrupted = _measure(children, on_progress)
        reports = tuple(child.report for child in children if child.report is not None)
        return Outcome(reports, interrupted)
    finally:
        for child in children:
            child.end()


def _measure(children: Sequence[_Child], on_progress: OnProgress | None) -> bool:
    _gather(children, lambda child: child.ready, time.monotonic() + _READY_S, None)
    try:
        for child in children:
            child.say(GO)
        _gather(children, lambda child: child.report is not None, None, on_progress)
    except KeyboardInterrupt:
        for child in children:
            child.stop()
        _gather(children, lambda child: child.report is not None, time.monotonic() + _STOP_S, None)
        return True
    return False


def _gather(
    children: Sequence[_Child],
    arrived: Callable[[_Child], bool],
    deadline: float | None,
    on_progress: OnProgress | None,
) -> None:
    """Listen until every child has `arrived`. Raises MdeployError past the deadline (monotonic seconds)."""
    begun = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for child in children:
            if not arrived(child):
                selector.register(child.stdout, selectors.EVENT_READ, child)
        while selector.get_map():
            for key, _ in selector.select(0.5):
                key.data.hear()
                if arrived(key.data):
                    selector.unregister(key.fileobj)
            if deadline is not None and time.monotonic() > deadline:
                raise MdeployError("the load workers do not answer", hint="is this machine overloaded?")
            if on_progress is not None:
                on_progress(_progress(children, time.monotonic() - begun))


def _progress(children: Sequence[_Child], elapsed_s: float) -> BenchProgress:
    ticks = [child.tick for child in children]
    return BenchProgress(
        elapsed_s=elapsed_s,
        running=sum(tick.running for tick in ticks),
        completed=sum(tick.completed for tick in ticks),
        failed=sum(tick.failed for tick in ticks),
        chunks=sum(tick.chunks for tick in ticks),
    )
