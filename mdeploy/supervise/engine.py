"""One run of an engine: its processes, its shared memory, its temporary files, its output.

A run has an id of its own; whatever bears it ends with the run, and nothing else does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mdeploy.specs import ServiceSpec
from mdeploy.supervise import processes
from mdeploy.supervise.logs import LogWriter, Pump
from mdeploy.supervise.state import Segments

_LOOK_STARTING_S, _LOOK_READY_S = 2.0, 60.0
"""How often all of /proc is read for an engine's processes; a ready engine makes no more shared memory."""

# Never handed to an engine: other Python environments, service managers, and secrets that are not its own.
_NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "CREDENTIALS_DIRECTORY",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "VLLM_USE_MODELSCOPE",
    *processes.SECRETS,
)


class Engine(Protocol):
    """What the supervisor does to a running engine."""

    pid: int

    def poll(self) -> int | None:
        """The main process's exit status (negative: a signal's number), None while it lives."""

    def observe(self, *, starting: bool) -> None:
        """Look after it: collect dead orphans, and now and then (closely while it starts) `look`."""

    def look(self) -> None:
        """Note its processes and the shared memory they use: a killed process cannot be asked any more."""

    def frozen(self) -> tuple[int, ...]:
        """Processes of it that are stopped by a signal."""

    def lost(self) -> tuple[int, ...]:
        """Processes of it that were there and are gone, each told once."""

    def signal(self, number: int) -> None:
        """Signal the main process."""

    def lives(self) -> bool:
        """True while any process of it lives."""

    def lines(self) -> Sequence[str]:
        """The last lines it printed."""

    def end(self) -> tuple[int, ...]:
        """End all of it and remove what it left; returns the processes that would not die."""


class Process:
    """An engine that is really running: `Engine` as the machine has it."""

    def __init__(
        self,
        spec: ServiceSpec,
        run_id: str,
        secrets: Mapping[str, str],
        writer: LogWriter | None,
        echo: Callable[[bytes], None] | None,
        remember: Callable[[Segments], None],
    ) -> None:
        """Start it. Raises OSError where that cannot be done."""
        self._run_id, self._remember = run_id, remember
        self._scratch = processes.scratch(run_id)
        self._segments = Segments(before=processes.all_shared_memory())
        self._looked = 0.0
        self._pids: tuple[int, ...] = ()
        self._scratch.mkdir(mode=0o700)
        self._main = self._start(spec, secrets)
        self.pid = self._main.pid
        assert self._main.stdout is not None
        self._pump = Pump(self._main.stdout, writer, echo)
        self._pump.start()

    def _start(self, spec: ServiceSpec, secrets: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            spec.argv,
            cwd=spec.cwd,
            env=self._environment(spec, secrets),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=processes.die_with_parent(),
        )

    def _environment(self, spec: ServiceSpec, secrets: Mapping[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        path = f"{Path(spec.argv[0]).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        ours = {"PATH": path, "TMPDIR": str(self._scratch), "PYTHONUNBUFFERED": "1"}
        return {**inherited, **spec.env, **ours, **secrets, **processes.marker_environment(self._run_id)}

    def poll(self) -> int | None:
        """See `Engine`."""
        return self._main.poll()

    def observe(self, *, starting: bool) -> None:
        """See `Engine`."""
        processes.reap_orphans(self.pid)
        if time.monotonic() - self._looked >= (_LOOK_STARTING_S if starting else _LOOK_READY_S):
            self.look()
        elif starting:
            self._note((self.pid, *processes.descendants(self.pid)))

    def look(self) -> None:
        """See `Engine`."""
        self._looked = time.monotonic()
        self._note(processes.marked(self._run_id))

    def _note(self, pids: tuple[int, ...]) -> None:
        self._pids = pids
        seen = self._segments.seen | processes.shared_memory(pids)
        if seen != self._segments.seen:
            self._segments = replace(self._segments, seen=seen)
            self._remember(self._segments)

    def frozen(self) -> tuple[int, ...]:
        """See `Engine`."""
        stopped = (pid for pid in {self.pid, *self._pids} if processes.is_frozen(pid))
        return tuple(pid for pid in stopped if processes.is_marked(pid, self._run_id))  # and no reused pid

    def lost(self) -> tuple[int, ...]:
        """See `Engine`."""
        gone = tuple(pid for pid in self._pids if not processes.is_marked(pid, self._run_id))
        self._pids = tuple(pid for pid in self._pids if pid not in gone)
        return gone

    def signal(self, number: int) -> None:
        """See `Engine`."""
        self.look()
        self._main.send_signal(number)
        self._main.send_signal(signal.SIGCONT)  # one that is stopped would never see it

    def lives(self) -> bool:
        """See `Engine`."""
        return bool(processes.marked(self._run_id))

    def lines(self) -> Sequence[str]:
        """See `Engine`."""
        return self._pump.lines()

    def end(self) -> tuple[int, ...]:
        """See `Engine`. After it the log is whole."""
        self.look()
        survivors = processes.end_run(self._run_id, self._segments.ours(), str(self._scratch))
        self._main.poll()
        self._pump.join(timeout=5.0)
        return survivors
