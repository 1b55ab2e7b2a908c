"""What a supervisor takes from the machine: time, signals that wake it, engines, probes, GPU memory.

The supervisor sees `World` only, so that tests can hand it a clock that jumps and engines that
die on cue. `Machine` is the real one.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mdeploy.errors import ConfigError
from mdeploy.specs import Manager, ServiceSpec
from mdeploy.supervise import processes
from mdeploy.supervise.engine import Engine, Process
from mdeploy.supervise.health import Condition, Health, HttpProber, Watch
from mdeploy.supervise.logs import LogWriter
from mdeploy.supervise.ports import check_port, listens
from mdeploy.supervise.state import Segments, ServiceFiles

_ECHO_LINES, _FLUSH_S = 10_000, 2.0

Headers = Callable[[], Mapping[str, str]]


class Watching(Protocol):
    """What the supervisor learns from whoever asks the service how it is."""

    ready: threading.Event
    refusals: int
    refusal: str
    last: Health

    def start(self) -> None:
        """Begin to ask."""

    def stop(self) -> None:
        """Ask no more."""

    def condition(self, frozen: Sequence[int], lost: Sequence[int]) -> Condition:
        """How a service is that was ready; `frozen` are its stopped processes, `lost` those that died just now."""


class World(Protocol):
    """Everything outside the supervisor's own decisions."""

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""

    def unix(self) -> float:
        """Seconds since 1970."""

    def wait(self, seconds: float) -> None:
        """Let time pass; `wake` ends it early."""

    def wake(self) -> None:
        """End a wait, also from a signal handler."""

    def check_port(self) -> None:
        """Raises PortTakenError where the service cannot listen."""

    def spawn(self, run_id: str, secrets: Mapping[str, str]) -> Engine:
        """Start an engine. Raises OSError."""

    def watch(self, run_id: str, headers: Headers) -> Watching:
        """Whoever asks the engine of a run how it is."""

    def free_mib(self) -> Mapping[int, int]:
        """Free memory of the GPUs the service is planned on, by index; empty without GPUs."""

    def note(self, text: str) -> None:
        """A line of the supervisor's own in the log of the service."""


class Machine:
    """The machine we run on."""

    def __init__(
        self,
        spec: ServiceSpec,
        files: ServiceFiles,
        manager: Manager,
        free_mib: Callable[[], Mapping[int, int]],
    ) -> None:
        self._spec, self._files, self.free_mib = spec, files, free_mib
        self._echo = None if manager == "detached" else Echo()
        limits = spec.limits
        # Under systemd the journal keeps, rotates and dates what we print.
        self._writer = None if manager == "systemd" else LogWriter(files.log, limits.log_bytes, limits.log_files)
        self._woken, self._waker = os.pipe()
        for end in (self._woken, self._waker):
            os.set_blocking(end, False)

    def now(self) -> float:
        """See `World`."""
        return time.monotonic()

    def unix(self) -> float:
        """See `World`."""
        return time.time()

    def wait(self, seconds: float) -> None:
        """See `World`."""
        if select.select([self._woken], [], [], max(seconds, 0.0))[0]:
            os.read(self._woken, 4096)

    def wake(self) -> None:
        """See `World`. A pipe, not a lock: a signal handler may interrupt whoever holds the lock."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            os.write(self._waker, b"!")

    def check_port(self) -> None:
        """See `World`."""
        check_port(self._spec.host, self._spec.port)

    def spawn(self, run_id: str, secrets: Mapping[str, str]) -> Engine:
        """See `World`."""
        echo = self._echo.write if self._echo else None
        return Process(self._spec, run_id, secrets, self._writer, echo, self._remember)

    def watch(self, run_id: str, headers: Headers) -> Watching:
        """See `World`."""
        spec = self._spec
        prober = HttpProber(spec.url, spec.probe, spec.limits.health_timeout_s, headers)
        return Watch(prober, spec.limits, lambda: listens(processes.marked(run_id), spec.port), spec.probe.timeout_s)

    def note(self, text: str) -> None:
        """See `World`."""
        if self._writer:
            self._writer.note(text)
        if self._echo:
            self._echo.write(f"mdeploy: {text}\n".encode())

    def close(self) -> None:
        """Nothing more will be said."""
        if self._echo:
            self._echo.close()

    def _remember(self, segments: Segments) -> None:
        """For whoever clears up after us if we are killed; a full disk must not end a healthy service."""
        try:
            self._files.write_segments(segments)
        except ConfigError as error:
            self.note(f"warning: {error.message}")


class Echo(threading.Thread):
    """Our stdout, from a thread of its own: a terminal in copy mode takes nothing, and must not stop the service.

    What it does not take in time is dropped, the oldest lines first.
    """

    def __init__(self) -> None:
        super().__init__(name="echo", daemon=True)
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_ECHO_LINES)
        self._news = threading.Semaphore(0)
        self._over = False
        self.start()

    def write(self, line: bytes) -> None:
        """Hand over a line, without waiting."""
        self._lines.append(line)
        self._news.release()

    def run(self) -> None:
        """Until it is closed, or the reader left."""
        while True:
            self._news.acquire()
            try:
                while self._lines:
                    sys.stdout.buffer.write(self._lines.popleft())
                    sys.stdout.buffer.flush()
            except OSError:
                return
            if self._over:
                return

    def close(self) -> None:
        """Let it print the rest, for as long as a reader may take."""
        self._over = True
        self._news.release()
        self.join(_FLUSH_S)
