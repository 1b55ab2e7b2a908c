"""What the command line does to services from outside: start one detached, stop one, wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from mdeploy.errors import AlreadyRunningError, MdeployError, NotReadyError
from mdeploy.specs import ServiceRecord, ServiceStatus
from mdeploy.supervise import processes, state
from mdeploy.supervise.state import ServiceFiles

_POLL_S = 0.1

_ORDERLY_S = 45.0
"""What an orderly end takes at most beside the drain: stragglers, the last kills, GPU memory, the log."""

_FIRST_SIGN_S = 30.0
"""How long a supervisor may live without having written its record."""


def run_command(files: ServiceFiles) -> tuple[list[str], dict[str, str]]:
    """The command that supervises a service, whoever starts it, and its environment.

    The home is handed on by name: a .env that set it is not seen from another directory.
    """
    command = [sys.executable, "-m", "mdeploy", "run", files.name]
    env = {name: value for name, value in os.environ.items() if name not in processes.SECRETS}
    return command, {**env, "MDEPLOY_HOME": str(files.home)}


def start_detached(files: ServiceFiles, on_progress: Callable[[ServiceStatus], None]) -> ServiceStatus:
    """Start a supervisor that outlives this terminal and wait for its first real answer.

    Returns the status, ready or failed. An interrupt while waiting stops the service again.
    """
    supervisor = spawn_detached(files)
    try:
        return _wait_started(files, supervisor, on_progress)
    except BaseException:
        _withdraw(files, supervisor)
        raise


def spawn_detached(files: ServiceFiles) -> subprocess.Popen[bytes]:
    """Start a supervisor that outlives this terminal, and leave it to itself."""
    command, env = run_command(files)
    with files.open_own_words() as errors:
        return subprocess.Popen(
            [*command, "--manager", "detached"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            cwd="/",
        )


def _withdraw(files: ServiceFiles, supervisor: subprocess.Popen[bytes]) -> None:
    """End the supervisor we started, and only that one: another may own the service by now."""
    record = files.record()
    if record and record.pid == supervisor.pid:
        stop(files)
    elif supervisor.poll() is None:
        supervisor.terminate()
        supervisor.wait()


def _wait_started(
    files: ServiceFiles, supervisor: subprocess.Popen[bytes], on_progress: Callable[[ServiceStatus], None]
) -> ServiceStatus:
    deadline = time.monotonic() + _FIRST_SIGN_S
    while True:
        over = supervisor.poll() is not None
        record = files.record()
        if record and record.pid == supervisor.pid:
            deadline = float("inf")
            now = state.status(files)
            on_progress(now)
            if now.phase in ("ready", "failed", "stopped"):
                return now
        if over:
            raise _supervisor_died(files)
        if time.monotonic() > deadline:
            said = files.own_words() or "it wrote nothing"
            raise NotReadyError(
                f"the supervisor of {files.name} gives no sign: {said}", hint=f"df -h {files.directory}"
            )
        time.sleep(_POLL_S)


def wait_settled(files: ServiceFiles, on_progress: Callable[[ServiceStatus], None]) -> ServiceStatus:
    """Wait for a start that somebody else began; returns the status it ends in."""
    while True:
        now = state.status(files)
        on_progress(now)
        if now.phase in ("ready", "failed") or not files.is_supervised():
            return state.status(files)
        time.sleep(_POLL_S)


def _supervisor_died(files: ServiceFiles) -> MdeployError:
    if files.is_supervised():
        return state.already_running(files.name)
    last = files.own_words() or "it wrote nothing"
    return MdeployError(f"the supervisor of {files.name} ended at once: {last}", hint=f"mdeploy run {files.name}")


def stop(files: ServiceFiles) -> bool:
    """End a service and everything of it; True where something was running.

    Safe to repeat and to race with: the supervisor does the work where it lives, otherwise its
    remains are cleared here. Raises NotReadyError for processes that will not die.
    """
    files.check_owner()
    patience_s = files.limits().stop_timeout_s + _ORDERLY_S
    supervised = files.is_supervised()
    while True:
        if not _is_gone_after(files, signal.SIGTERM, patience_s) and not _is_gone_after(files, signal.SIGKILL, 10.0):
            hint = "it hangs in the kernel: see dmesg"
            raise NotReadyError(f"the supervisor of {files.name} does not end", hint=hint)
        try:
            return _clear(files) or supervised
        except AlreadyRunningError:  # another stop clears, or somebody started it again meanwhile
            supervised = True


def _is_gone_after(files: ServiceFiles, sig: int, patience_s: float) -> bool:
    """Signal the supervisor once and wait for its end; one that takes its place meanwhile is signalled too."""
    deadline = time.monotonic() + patience_s
    signalled = None
    while True:
        record = files.record()
        lives = record is not None and state.lives(record)
        if not lives and not files.is_supervised():
            return True
        if record and lives and record.pid != signalled:
            if sig == signal.SIGKILL:
                files.forbid(record)
            processes.send([record.pid], sig)
            processes.send([record.pid], signal.SIGCONT)  # one that is stopped would never see it
            signalled = record.pid
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


def _clear(files: ServiceFiles) -> bool:
    """Clear what a dead supervisor left; True where there was anything."""
    if files.record() is None:
        return False
    with files.locked():
        record = files.record()
        if record is None:
            return False
        if record.boot_id == processes.boot_id():
            remains = _end_run(files, record)
        else:
            remains = ()
            processes.remove_scratch(record.scratch)
        if record.phase != "stopped":
            files.settle(record)
    return bool(remains)


def _end_run(files: ServiceFiles, record: ServiceRecord) -> tuple[int, ...]:
    """End what is left of a run and return the processes there were. Raises NotReadyError."""
    remains = processes.marked(record.run_id)
    segments = files.segments().ours(processes.shared_memory(remains))
    survivors = processes.end_run(record.run_id, segments, record.scratch)
    if survivors:
        pids = " ".join(map(str, survivors))
        raise NotReadyError(f"processes {pids} of {files.name} do not die", hint="they hang in the kernel: see dmesg")
    return remains
