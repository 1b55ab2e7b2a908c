"""`mdeploy run NAME`: the one main process of a service in every mode.

It starts the engine, says ready only after a real answer, watches it, and when it ends, asked
or not, leaves no process, no port and no shared memory behind.
"""

from __future__ import annotations

import os
import signal
import socket
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
from mdeploy.supervise.state import ServiceFiles

_TICK_S = 0.25
_SHM_EVERY_S = 2.0
_MISSES = 3
"""Failed health checks in a row that make a ready service unhealthy."""

_STRAGGLERS_S = 3.0
"""What the engine's children get to end by themselves once its main process has."""

_NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "VLLM_USE_MODELSCOPE",
    "NOTIFY_SOCKET",
    "MDEPLOY_API_KEY",
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
        self._shm: frozenset[str] = frozenset()
        self._shm_seen = 0.0
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
            self._clear_previous()
            self._write("starting")
            self._on_signals()
            processes.become_subreaper()
            try:
                engine = self._start()
            except (OSError, ConfigError) as error:
                return self._failed(_cannot_start(error))
            return self._supervise(engine)

    # start

    def _clear_previous(self) -> None:
        """End what a killed supervisor left: it would hold our port and our memory."""
        previous = self._files.record()
        if previous and previous.boot_id == self._record.boot_id:
            processes.sweep(previous.run_id)
            processes.unlink_shared_memory(self._files.shm())
            processes.remove_scratch(previous.scratch)

    def _on_signals(self) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stops += 1
            self._wake.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, stop)

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self._spec
        check_port(spec.host, spec.port)
        Path(self._record.scratch).mkdir(mode=0o700)
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
        self._secrets = {name: _secret(Path(file)) for name, file in spec.secrets.items()}
        ours = {"PATH": path, "TMPDIR": self._record.scratch, "PYTHONUNBUFFERED": "1"}
        return {**inherited, **ours, **spec.env, **self._secrets, **marker}

    # life

    def _supervise(self, engine: subprocess.Popen[bytes]) -> int:
        self._write("starting", detail="starting the engine")
        bearer = self._secrets.get(self._spec.probe.bearer or "")
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        prober = HttpProber(self._spec.url, self._spec.probe, headers)
        watch = Watch(prober, self._spec.limits.health_interval_s)
        watch.start()
        deadline = time.monotonic() + self._spec.limits.start_timeout_s
        try:
            return self._loop(engine, watch, deadline)
        finally:
            watch.stop()

    def _loop(self, engine: subprocess.Popen[bytes], watch: Watch, deadline: float) -> int:
        while True:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            if self._stops:
                return self._stop(engine)
            status = engine.poll()
            if status is not None:
                return self._ended(status, watch.ready.is_set())
            self._observe(watch)
            if not watch.ready.is_set() and time.monotonic() > deadline:
                return self._too_slow(engine, watch)

    def _observe(self, watch: Watch) -> None:
        """Bring the record up to what is seen."""
        self._see_shared_memory()
        if not watch.ready.is_set():
            self._write("starting", detail=self._words.progress(self._pump.lines()) or self._record.detail)
        elif watch.misses >= _MISSES:
            self._write("unhealthy", detail=watch.last.detail)
        elif self._record.phase != "ready":
            self._see_shared_memory(now=True)
            self._write("ready")

    def _see_shared_memory(self, *, now: bool = False) -> None:
        """Remember which segments the run uses: a killed process cannot be asked any more."""
        if not now and time.monotonic() - self._shm_seen < _SHM_EVERY_S:
            return
        self._shm_seen = time.monotonic()
        seen = self._shm | processes.shared_memory(processes.marked(self._record.run_id))
        if seen != self._shm:
            self._shm = seen
            self._files.write_shm(seen)

    # end

    def _stop(self, engine: subprocess.Popen[bytes]) -> int:
        self._write("stopping")
        self._terminate(engine)
        self._clean_up()
        self._write("stopped")
        return ExitCode.OK

    def _too_slow(self, engine: subprocess.Popen[bytes], watch: Watch) -> int:
        seconds = self._spec.limits.start_timeout_s
        self._terminate(engine)
        cause = f"not ready after {seconds:.0f} s; last seen: {watch.last.detail}"
        return self._failed(Diagnosis(cause, f"mdeploy logs {self._spec.name}", ExitCode.NOT_READY))

    def _ended(self, status: int, was_ready: bool) -> int:
        self._clean_up()
        return self._failed(self._words.explain(self._pump.lines(), status, was_ready))

    def _failed(self, diagnosis: Diagnosis) -> int:
        self._record = replace(self._record, error=diagnosis.cause, hint=diagnosis.hint, exit_code=diagnosis.exit_code)
        self._write("failed")
        if self._echo:
            self._echo(f"error: {diagnosis.cause}\nhint:  {diagnosis.hint}\n".encode())
        return diagnosis.exit_code

    def _terminate(self, engine: subprocess.Popen[bytes]) -> None:
        """TERM the main process and give it time to drain; a second request to stop cuts it short."""
        self._see_shared_memory(now=True)
        asked = self._stops
        deadline = time.monotonic() + self._spec.limits.stop_timeout_s
        engine.terminate()
        while engine.poll() is None and time.monotonic() < deadline and self._stops <= max(asked, 1):
            self._wake.wait(0.05)
            self._wake.clear()
        if engine.poll() is not None:
            self._await_stragglers(asked)

    def _await_stragglers(self, asked: int) -> None:
        deadline = time.monotonic() + _STRAGGLERS_S
        while processes.marked(self._record.run_id) and time.monotonic() < deadline and self._stops <= max(asked, 1):
            processes.reap()
            self._wake.wait(0.1)
            self._wake.clear()

    def _clean_up(self) -> None:
        """After this nothing of the run is left, and the log is whole."""
        processes.sweep(self._record.run_id)
        processes.unlink_shared_memory(self._shm)
        processes.remove_scratch(self._record.scratch)
        self._pump.join(timeout=5.0)
        self._writer.close()

    def _write(self, phase: Phase, detail: str = "") -> None:
        """Record a change; an unchanged record is not written again."""
        changed = phase != self._record.phase
        since = time.time() if changed else self._record.since
        record = replace(self._record, phase=phase, since=since, detail=detail)
        if record != self._written:
            self._files.write_record(record)
        self._record = self._written = record

    _written: ServiceRecord | None = None


def check_port(host: str, port: int) -> None:
    """Bind once and let go. Raises ConfigError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            hint = f"take another --port, or see who has it: ss -ltnp 'sport = :{port}'"
            raise ConfigError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from error


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


def _echo(line: bytes) -> None:
    """To our stdout; a reader that left must not stop the service."""
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except OSError:
        return
