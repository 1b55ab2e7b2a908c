"""What is done to the service. Every fault returns how the service must look once it is over it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import chaos_scan as scan
from chaos_service import NAME, Look, Service, kill


@dataclass(frozen=True)
class Outcome:
    """How a round must end.

    `over` tells whether the fault has had its effect and was mended; `by_itself` is False where
    somebody has to start the service again; `is_clean` that the service has cleared up before that.
    """

    what: str
    over: Callable[[Look], bool]
    by_itself: bool = True
    is_clean: bool = False
    problems: tuple[str, ...] = ()


Fault = Callable[[Service, random.Random], Outcome]


def is_whole(look: Look) -> bool:
    """One supervisor, one guard, one run that answers, nothing stopped."""
    scene = look.scene
    alone = len(scene.supervisors) == 1 and len(scene.guards) == 1 and len(scene.runs) == 1
    return alone and look.answers and not scene.stopped


def is_gone(look: Look) -> bool:
    """Not a process is left."""
    return not look.scene.all


def _victim(service: Service, which: str, dice: random.Random) -> scan.Process:
    scene = scan.scene(service.home)
    servers = scene.servers
    groups = {
        "supervisor": scene.supervisors,
        "guard": scene.guards,
        "server": servers,
        "core": tuple(p for p in scene.engines if p not in servers and not is_helper(p)),
        "helper": tuple(p for p in scene.engines if is_helper(p)),
        "any": scene.all,
    }
    if not groups[which]:
        raise LookupError(f"the service has no {which}: {scene}")
    return dice.choice(groups[which])


def is_helper(process: scan.Process) -> bool:
    """Python's own servants of a multi-process program: an engine lives on without them."""
    return any(word in " ".join(process.argv) for word in ("resource_tracker", "forkserver"))


def _kill(which: str) -> Fault:
    def fault(service: Service, dice: random.Random) -> Outcome:
        victim = _victim(service, which, dice)
        runs = scan.scene(service.home).runs
        kill(victim.pid, signal.SIGKILL)
        same_run = which in ("guard", "helper")

        def over(look: Look) -> bool:
            gone = victim.pid not in {process.pid for process in look.scene.all}
            return gone and is_whole(look) and (same_run or not look.scene.runs & runs)

        return Outcome(f"kill -9 {victim}", over)

    return fault


def _kill_everything(service: Service, dice: random.Random) -> Outcome:
    victims = list(scan.scene(service.home).all)
    dice.shuffle(victims)
    for victim in victims:
        kill(victim.pid, signal.SIGKILL)
    return Outcome(f"kill -9 of all {len(victims)} processes", is_gone, by_itself=False)


def _kill_two(service: Service, dice: random.Random) -> Outcome:
    """Any two processes at once. Without supervisor and guard nobody is left to start anything."""
    scene = scan.scene(service.home)
    victims = dice.sample(scene.all, 2)
    for victim in victims:
        kill(victim.pid, signal.SIGKILL)
    orphaned = {victim.pid for victim in victims} == {process.pid for process in (*scene.supervisors, *scene.guards)}
    pids = {victim.pid for victim in victims}

    def over(look: Look) -> bool:
        if pids & {process.pid for process in look.scene.all}:
            return False
        return is_gone(look) if orphaned else is_whole(look)

    what = " and ".join(map(str, victims))
    return Outcome(f"kill -9 of {what}", over, by_itself=not orphaned)


def _kill_heir(service: Service, dice: random.Random) -> Outcome:
    """The supervisor, and whoever takes its place as soon as it does: the service may be lost, but nobody may lie."""
    first = _victim(service, "supervisor", dice)
    kill(first.pid, signal.SIGKILL)
    deadline = time.monotonic() + service.patience_s / 4
    while not (heirs := [p for p in scan.scene(service.home).supervisors if p.pid != first.pid]):
        if time.monotonic() > deadline:
            return Outcome(f"kill -9 {first}", is_whole, problems=("nobody took the supervisor's place",))
    time.sleep(dice.choice([0.0, 0.05, 0.3]))
    kill(heirs[0].pid, signal.SIGKILL)

    def over(look: Look) -> bool:
        dead = not {first.pid, heirs[0].pid} & {process.pid for process in look.scene.all}
        return dead and (is_whole(look) or is_gone(look))

    return Outcome(f"kill -9 {first}, then {heirs[0]}", over, by_itself=False)


def _stop(which: str) -> Fault:
    def fault(service: Service, dice: random.Random) -> Outcome:
        victim = _victim(service, which, dice)
        kill(victim.pid, signal.SIGSTOP)
        return Outcome(f"SIGSTOP {victim}", is_whole)

    return fault


def _truncate_log(service: Service, dice: random.Random) -> Outcome:
    size = dice.choice([0, 10])
    with contextlib.suppress(FileNotFoundError):  # a round before removed it, and nothing was printed since
        os.truncate(service.files / "log", size)
    return Outcome("log truncated", is_whole)


def _remove_log(service: Service, dice: random.Random) -> Outcome:
    (service.files / "log").unlink(missing_ok=True)
    return Outcome("log removed", is_whole)


def _tear_state(service: Service, dice: random.Random) -> Outcome:
    """In place, as a file system does that lost the end, or an editor that went mad."""
    path = service.files / "state.json"
    whole = path.read_bytes()
    how, data = dice.choice(
        [
            ("half", whole[: len(whole) // 2]),
            ("empty", b""),
            ("garbage", dice.randbytes(300)),
            ("an object of another shape", b'{"phase": 7}'),
            ("gone", None),
        ]
    )
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    return Outcome(f"state file {how}", is_whole)


def _two_stops(service: Service, dice: random.Random) -> Outcome:
    first, second = service.begin("stop", NAME), service.begin("stop", NAME)
    problems = []
    for process in (first, second):
        _, err = process.communicate(timeout=2 * service.patience_s)
        if process.returncode != 0:
            problems.append(f"one of two stops ended with {process.returncode}: {err.strip()}")
    return Outcome("two stops at once", is_gone, by_itself=False, is_clean=True, problems=tuple(problems))


def _stop_and_restart(service: Service, dice: random.Random) -> Outcome:
    """Either may win: what counts is that what is then said is true."""
    processes = [service.begin("stop", NAME), service.begin("restart", NAME)]
    for process in processes:
        process.communicate(timeout=2 * service.patience_s)
    return Outcome("stop and restart at once", lambda look: is_whole(look) or is_gone(look), by_itself=False)


def _kill_while_starting(service: Service, dice: random.Random) -> Outcome:
    """Any process, at any moment of a restart; a service that never was ready may be given up."""
    restart = service.begin("restart", NAME)
    time.sleep(dice.uniform(0.0, service.patience_s / 20))
    try:
        victim: scan.Process | None = _victim(service, "any", dice)
    except LookupError:
        victim = None
    if victim:
        kill(victim.pid, signal.SIGKILL)
    restart.communicate(timeout=2 * service.patience_s)
    return Outcome(f"during a restart kill -9 {victim}", lambda look: True, by_itself=False)


FAULTS: dict[str, Fault] = {
    "kill-supervisor": _kill("supervisor"),
    "kill-guard": _kill("guard"),
    "kill-server": _kill("server"),
    "kill-core": _kill("core"),
    "kill-two": _kill_two,
    "kill-heir": _kill_heir,
    "kill-everything": _kill_everything,
    "kill-while-starting": _kill_while_starting,
    "stop-supervisor": _stop("supervisor"),
    "stop-guard": _stop("guard"),
    "stop-server": _stop("server"),
    "stop-core": _stop("core"),
    "log-truncated": _truncate_log,
    "log-removed": _remove_log,
    "state-torn": _tear_state,
    "two-stops": _two_stops,
    "stop-and-restart": _stop_and_restart,
}
