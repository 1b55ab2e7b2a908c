"""Why a run of an engine ended, in a user's words: what the supervisor itself finds out.

What only the engine's log can tell comes from whoever knows that engine, as `Words`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mdeploy.errors import ConfigError, ExitCode
from mdeploy.specs import Diagnosis
from mdeploy.supervise.ports import PortTakenError


@dataclass(frozen=True, slots=True)
class Words:
    """What the supervisor must be told about a kind of engine: it knows processes, not vLLM.

    `progress` finds the start-up step in the latest log lines, `explain` the cause of an end in
    all of them (with the exit status, and whether it had been ready).
    """

    progress: Callable[[Sequence[str]], str]
    explain: Callable[[Sequence[str], int, bool], Diagnosis]


def cannot_start(error: OSError | ConfigError) -> Diagnosis:
    """There is no engine: a port may become free, a key or an interpreter does not appear by itself."""
    if isinstance(error, ConfigError):
        return Diagnosis(error.message, error.hint, ExitCode.CONFIG, permanent=not isinstance(error, PortTakenError))
    missing = isinstance(error, (FileNotFoundError, PermissionError))
    return Diagnosis(f"the engine cannot be started: {error}", "mdeploy engines ls", ExitCode.CONFIG, missing)


def will_not_die(pids: Sequence[int]) -> Diagnosis:
    """KILL did not end these."""
    which = " ".join(map(str, pids))
    return Diagnosis(f"processes {which} do not die", "they hang in the kernel: see dmesg", ExitCode.NOT_READY)


def supervisor_killed(name: str) -> Diagnosis:
    """We took the place of a supervisor that did not end in order."""
    return Diagnosis("its supervisor was killed", f"mdeploy restart {name}", ExitCode.FAILURE)


def refuses(name: str, seen: str) -> Diagnosis:
    """The engine is healthy and calls our first request wrong: asking again will not help."""
    what = f"the engine refuses a first request: {seen}"
    return Diagnosis(what, f"mdeploy logs {name}", ExitCode.CONFIG, permanent=True)


def too_late(name: str, seconds: float, seen: str) -> Diagnosis:
    """The time to become ready is over."""
    return Diagnosis(f"not ready after {seconds:g} s; last seen: {seen}", f"mdeploy logs {name}", ExitCode.NOT_READY)


def hangs(name: str, seen: str) -> Diagnosis:
    """It lives and does not work."""
    return Diagnosis(f"the engine hangs: {seen}", f"mdeploy logs {name}", ExitCode.NOT_READY)
