"""`mdeploy run NAME`: the one main process of a service in every mode.

It starts the engine, says ready only after a real answer, watches it, and when it ends, asked
or not, leaves no process, no port and no shared memory behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from mdeploy.errors import ConfigError, ExitCode
from mdeploy.specs import Diagnosis, Manager, Phase, ServiceRecord, ServiceSpec
from mdeploy.supervise import processes
from mdeploy.supervise.health import HttpProber, Watch
from mdeploy.supervise.logs import LogWriter, Pump
from mdeploy.supervise.ports import check_port, listens
from mdeploy.supervise.state import Segments, ServiceFiles

_TICK_S = 0.25
_SHM_STARTING_S, _SHM_READY_S = 2.0, 60.0
"""How often shared memory is looked for. It reads all of /proc, and a ready engine makes no more of it."""

_MISSES = 3
"""Failed health checks in a row that make a ready service unhealthy."""

_REFUSALS = 3
"""Times in a row that a healthy engine may call our request wrong (4xx) before it is not asked again."""

_STRAGGLERS_S = 3.0
"""What the engine's children get to end by themselves once its main process has."""

# Never handed to an engine: other Python environments, and secrets that are not its own.
_NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "NOTIFY_SOCKET",
    "VLLM_USE_MODELSCOPE",
    *processes.SECRETS,
)


@dataclass(frozen=True, slots=True)
class Words:
    """What the supervisor must be told about a kind of engine: it knows processes, not vLLM.

    `progress` finds the start-up step in the latest log lines, `explain` the cause of an end in
    all of them (with the exit status, and whether it had been ready).
    """

    progress: Callable[[Sequence[str]], str]
    explain: Callable[[Sequence[str], int, bool], Diagnosis]


class Supervisor:
    """Runs one service once, from start to clean end."""

    def __init__(self, spec: ServiceSpec, files: ServiceFiles, manager: Manager, words: Words) -> None:
        self._spec, self._files, self._words = spec, files, words
        self._echo = _echo if manager == "foreground" else None
        self._stops = 0
        self._wake = threading.Event()
        self._segments = Segments(before=processes.all_shared_memory())
        self._segments_seen = 0.0
        self._secrets: dict[str, str] = {}
        self._written: ServiceRecord | None = None
        pid, run_id = os.getpid(), uuid.uuid4().hex
        self._record = ServiceRecord(
            name=spec.name,
            run_id=run_id,
            pid=pid,
            pid_created=processes.created(pid) or 0.0,
            boot_id=processes.boot_id(),
            manager=manager,
            phase="starting",
            since=time.time(),
            scratch=str(processes.scratch(run_id)),
        )

    def run(self) -> int:
        """Until the engine ends or a signal asks for the end; returns the exit code."""
        with self._files.locked():
            self._on_signals()
            self._clear_previous()
            self._write("starting")
            processes.become_subreaper()
            try:
                self._prepare()
                engine = self._start()
            except (OSError, ConfigError) as error:
                processes.remove_scratch(self._record.scratch)
                return self._failed(_cannot_start(error))
            try:
                return self._supervise(engine)
            except BaseException:  # a bug of ours must not leave an engine nobody watches
                self._clean_up()
                raise

    # start

    def _clear_previous(self) -> None:
        """End what a killed supervisor left: it would hold our port and our memory."""
        previous = self._files.record()
        if previous and previous.boot_id == self._record.boot_id:
            processes.end_run(previous.run_id, self._files.segments().ours(), previous.scratch)

    def _on_signals(self) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stops += 1
            self._wake.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asked to outlive the terminal
                signal.signal(number, stop)

    def _prepare(self) -> None:
        """Everything that can fail, before there is a process to clean up after."""
        spec = self._spec
        check_port(spec.host, spec.port)
        self._secrets = {name: _secret(Path(file)) for name, file in spec.secrets.items()}
        bearer = self._secrets.get(spec.probe.bearer or "")
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        run_id, port = self._record.run_id, spec.port
        self._watch = Watch(
            HttpProber(spec.url, spec.probe, headers),
            spec.limits.health_interval_s,
            is_ours=lambda: listens(processes.marked(run_id), port),
        )
        Path(self._record.scratch).mkdir(mode=0o700)

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self._spec
        engine = subprocess.Popen(
            spec.argv,
            cwd=spec.cwd,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=processes.die_with_parent(),
        )
        self._record = replace(self._record, engine_pid=engine.pid)
        assert engine.stdout is not None
        self._writer = LogWriter(self._files.log, spec.limits.log_bytes)
        self._pump = Pump(engine.stdout, self._writer, self._echo)  # type: ignore[arg-type]
        self._pump.start()
        return engine

    def _environment(self) -> dict[str, str]:
        spec = self._spec
        inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        path = f"{Path(spec.argv[0]).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        marker = processes.marker_environment(self._record.run_id)
        ours = {"PATH": path, "TMPDIR": self._record.scratch, "PYTHONUNBUFFERED": "1"}
        return {**inherited, **spec.env, **ours, **self._secrets, **marker}

    # life

    def _supervise(self, engine: subprocess.Popen[bytes]) -> int:
        self._write("starting", detail="starting the engine")
        self._watch.start()
        deadline = time.monotonic() + self._spec.limits.start_timeout_s
        try:
            return self._loop(engine, deadline)
        finally:
            self._watch.stop()

    def _loop(self, engine: subprocess.Popen[bytes], deadline: float) -> int:
        ready = self._watch.ready
        while True:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            if self._stops:
                return self._stop(engine)
            status = engine.poll()
            if status is not None:
                return self._ended(status, ready.is_set())
            processes.reap_orphans(engine.pid)
            self._observe()
            if not ready.is_set() and (time.monotonic() > deadline or self._watch.refusals >= _REFUSALS):
                return self._not_ready(engine)

    def _observe(self) -> None:
        """Bring the record up to what is seen."""
        self._see_shared_memory()
        if not self._watch.ready.is_set():
            step = self._words.progress(self._pump.lines()) or "starting the engine"
            self._write("starting", detail=f"{step}: {self._watch.refusal}" if self._watch.refusal else step)
        elif self._watch.misses >= _MISSES:
            self._write("unhealthy", detail=self._watch.last.detail)
        elif self._record.phase != "ready":
            self._see_shared_memory(now=True)
            self._write("ready")

    def _see_shared_memory(self, *, now: bool = False) -> None:
        """Remember which segments the run uses: a killed process cannot be asked any more."""
        every_s = _SHM_READY_S if self._watch.ready.is_set() else _SHM_STARTING_S
        if not now and time.monotonic() - self._segments_seen < every_s:
            return
        self._segments_seen = time.monotonic()
        seen = self._segments.seen | processes.shared_memory(processes.marked(self._record.run_id))
        if seen != self._segments.seen:
            self._segments = replace(self._segments, seen=seen)
            self._keep(lambda: self._files.write_segments(self._segments))

    # end

    def _stop(self, engine: subprocess.Popen[bytes]) -> int:
        self._write("stopping")
        self._terminate(engine)
        survivors = self._clean_up()
        if survivors:
            return self._failed(_will_not_die(survivors))
        self._write("stopped")
        return ExitCode.OK

    def _not_ready(self, engine: subprocess.Popen[bytes]) -> int:
        """Give up on an engine that takes too long, or that refuses what it should answer."""
        seconds, last, refused = self._spec.limits.start_timeout_s, self._watch.last.detail, self._watch.refusals
        self._terminate(engine)
        self._clean_up()
        hint = f"mdeploy logs {self._spec.name}"
        if refused >= _REFUSALS:
            return self._failed(Diagnosis(f"the engine refuses a first request: {last}", hint, ExitCode.CONFIG))
        return self._failed(Diagnosis(f"not ready after {seconds:g} s; last seen: {last}", hint, ExitCode.NOT_READY))

    def _ended(self, status: int, was_ready: bool) -> int:
        self._clean_up()
        return self._failed(self._words.explain(self._pump.lines(), status, was_ready))

    def _failed(self, diagnosis: Diagnosis) -> int:
        self._record = replace(self._record, error=diagnosis.cause, hint=diagnosis.hint, exit_code=diagnosis.exit_code)
        self._write("failed")
        if self._echo:
            _complain(f"error: {diagnosis.cause}\nhint:  {diagnosis.hint}")
        return diagnosis.exit_code

    def _terminate(self, engine: subprocess.Popen[bytes]) -> None:
        """TERM the main process and give it time to drain; a second request to stop cuts it short."""
        self._see_shared_memory(now=True)
        engine.terminate()
        self._wait_while(lambda: engine.poll() is None, self._spec.limits.stop_timeout_s)
        if engine.poll() is not None:
            self._wait_while(lambda: bool(processes.marked(self._record.run_id)), _STRAGGLERS_S)

    def _wait_while(self, going: Callable[[], bool], seconds: float) -> None:
        asked, deadline = max(self._stops, 1), time.monotonic() + seconds
        while going() and time.monotonic() < deadline and self._stops <= asked:
            self._wake.wait(0.05)
            self._wake.clear()

    def _clean_up(self) -> tuple[int, ...]:
        """After this nothing of the run is left, and the log is whole; returns what would not die."""
        self._see_shared_memory(now=True)
        survivors = processes.end_run(self._record.run_id, self._segments.ours(), self._record.scratch)
        self._pump.join(timeout=5.0)
        self._writer.close()
        return survivors

    # record

    def _write(self, phase: Phase, detail: str = "") -> None:
        """Record a change; an unchanged record is not written again."""
        since = time.time() if phase != self._record.phase else self._record.since
        self._record = record = replace(self._record, phase=phase, since=since, detail=detail)
        if record != self._written and self._keep(lambda: self._files.write_record(record)):
            self._written = record

    def _keep(self, write: Callable[[], None]) -> bool:
        """Write to disk if it can be done: a full disk must not end a healthy service.

        Where it cannot, we say so and try again at the next change or tick.
        """
        try:
            write()
        except ConfigError as error:
            _complain(f"warning: {error.message}")
            return False
        return True


def _secret(path: Path) -> str:
    """A secret's value. Raises ConfigError for a missing or empty one: never run unprotected."""
    try:
        value = path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the key in {path}: {error.strerror}", hint="serve again with the key"
        ) from error
    if not value:
        raise ConfigError(f"{path} is empty", hint="serve again with the key")
    return value


def _cannot_start(error: OSError | ConfigError) -> Diagnosis:
    if isinstance(error, ConfigError):
        return Diagnosis(error.message, error.hint, ExitCode.CONFIG)
    return Diagnosis(f"the engine cannot be started: {error}", "mdeploy engines ls", ExitCode.CONFIG)


def _will_not_die(pids: Sequence[int]) -> Diagnosis:
    which = " ".join(map(str, pids))
    return Diagnosis(f"processes {which} do not die", "they hang in the kernel: see dmesg", ExitCode.NOT_READY)


def _complain(text: str) -> None:
    """To our stderr, which may lie on the very disk that is full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _echo(line: bytes) -> None:
    """To our stdout; a reader that left must not stop the service."""
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except OSError:
        return
