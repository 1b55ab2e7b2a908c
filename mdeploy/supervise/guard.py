"""A second pair of eyes for services without systemd: when the supervisor is killed, the guard takes its place.

The supervisor holds one end of a pipe, the guard waits at the other. The kernel closes the first
at any death; only a supervisor that ends in order says so before. The guard then becomes the next
supervisor (by exec), which clears what the first one left and goes on. A guard that is killed is
replaced by the supervisor. It runs as a file of its own, on the standard library alone: it has to
be small, and nothing may fail in it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_DONE = b"done"
_LOOK_S = 10.0
_FAREWELL_S = 5.0


class Guard:
    """The supervisor's side: keeps one guard alive, and dismisses it at the end."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], *, wakes: bool) -> None:
        """`command` supervises the service again, with `env`. `wakes` a supervisor that is stopped by a signal."""
        self._command, self._env = command, env
        self._ward = str(os.getpid()) if wakes else "0"
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """See that there is a guard, awake. A machine that can start no process now is asked again at the next call."""
        if self._process is not None and self._process.poll() is None:
            if _is_stopped(self._process.pid):
                self._process.send_signal(signal.SIGCONT)
            return
        self._close()
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, self._ward, *self._command],
                env=dict(self._env),
                stdin=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )

    def dismiss(self) -> None:
        """The supervisor ends in order: nobody has to take its place."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(_DONE)
            self._process.stdin.close()
            self._process.wait(_FAREWELL_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):  # killed or stopped
            self._process.kill()
            self._process.wait()

    def _close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None


def watch(supervisor: int, command: Sequence[str]) -> None:
    """The guard's side: wait for the end of the pipe, then become the supervisor or be done."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if _last_words(supervisor) == _DONE:
        return
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(command[0], list(command))


def _last_words(supervisor: int) -> bytes:
    """What the supervisor said until its end; where we know its pid, we wake it when it is stopped by a signal."""
    words, was_stopped = b"", False
    while True:
        if select.select([0], [], [], _LOOK_S)[0]:
            said = os.read(0, 64)
            if not said:
                return words
            words += said
            continue
        is_stopped = _is_stopped(supervisor)
        if is_stopped and was_stopped:
            with contextlib.suppress(OSError):  # it died a moment ago: the pipe will tell
                os.kill(supervisor, signal.SIGCONT)
        was_stopped = is_stopped


def _is_stopped(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2:])
