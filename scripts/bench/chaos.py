"""Kill, stop and damage a detached service at random, and compare what `mdeploy ps` says with what /proc shows.

Rounds with a stand-in engine, then with real vLLM on the CPU (--tp 2). After every fault `ps` must be right
within 5 s and stay so: ready if and only if a process of the service answers a real request; the pid it shows is
the supervisor's. After the recovery nothing of earlier runs may be left: processes, zombies, files in /dev/shm,
the port, temporary files. Only the command line is used, and a scan of /proc of this script's own.
The last line is JSON; the exit status is 1 where anything was violated.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos_faults import FAULTS, Fault, Outcome, is_whole
from chaos_service import NAME, Look, Row, Service, real_vllm, stand_in

RIGHT_S = 5.0
"""How long `ps` may be wrong."""

CLEAN_S = 10.0
"""How long a recovered service may take to clear what its last run left."""

PHASES_UP = ("starting", "ready", "unhealthy", "stopping")


@dataclass
class Tally:
    """What became of one kind of fault."""

    rounds: int = 0
    right: int = 0
    leaks: int = 0
    recovered: int = 0
    seconds: list[float] = field(default_factory=list)

    def row(self) -> Row:
        median = round(statistics.median(self.seconds), 2) if self.seconds else None
        counts = {"rounds": self.rounds, "right": self.right, "leaks": self.leaks, "recovered": self.recovered}
        return {**counts, "median_s_to_ready": median}


def main() -> int:
    """Run all rounds; print a table and, last, one line of JSON."""
    asked = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `finally`
    end = time.monotonic() + asked.seconds
    dice, tallies, violations = random.Random(asked.seed), dict[str, Tally](), list[str]()
    print(f"seed {asked.seed}", flush=True)
    if asked.rounds:
        with stand_in() as service:
            service.serve("-d", "--restart", "always")
            _rounds(service, asked.rounds, end, dice, tallies, violations)
    if asked.real_rounds:
        with real_vllm(asked.engines_home, "--tp", "2") as service:
            service.serve("-d", "--restart", "always")
            _rounds(service, asked.real_rounds, end, dice, tallies, violations, prefix="vllm ")
    print(f"{'fault':<26}{'rounds':>7}{'right':>7}{'leaks':>7}{'recovered':>11}{'median s':>10}")
    for name, tally in sorted(tallies.items()):
        cells = tally.row()
        print(f"{name:<26}{tally.rounds:>7}{tally.right:>7}{tally.leaks:>7}{tally.recovered:>11}", end="")
        print(f"{cells['median_s_to_ready'] if tally.seconds else '-':>10}")
    total = sum(tally.rounds for tally in tallies.values())
    real = sum(tally.rounds for name, tally in tallies.items() if name.startswith("vllm "))
    by_fault = {name: tally.row() for name, tally in sorted(tallies.items())}
    document = {"benchmark": "chaos", "seed": asked.seed, "rounds": total, "real_rounds": real}
    print(json.dumps({**document, "by_fault": by_fault, "violations": violations}))
    return 1 if violations else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="with the stand-in engine")
    parser.add_argument("--real-rounds", type=int, default=20, help="with real vLLM, 30 to 60 s each")
    parser.add_argument("--seconds", type=float, default=5400, help="begin no round later than this")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--engines-home", type=Path, help="an MDEPLOY_HOME that has vLLM; else it is installed")
    asked = parser.parse_args()
    for name in set(FAULTS) - set(asked.faults or FAULTS):
        del FAULTS[name]
    return asked


# rounds


def _rounds(
    service: Service,
    count: int,
    end: float,
    dice: random.Random,
    tallies: dict[str, Tally],
    violations: list[str],
    prefix: str = "",
) -> None:
    bag: list[str] = []
    for number in range(count):
        if time.monotonic() > end:
            print(f"time is over after {number} of {count} {prefix}rounds", flush=True)
            return
        if not bag:
            bag = list(FAULTS)
            dice.shuffle(bag)
        name = bag.pop()
        found = _round(service, FAULTS[name], dice, tallies.setdefault(prefix + name, Tally()))
        for problem in found:
            violations.append(f"{prefix}round {number}, {name}: {problem}")
            print(f"VIOLATION {violations[-1]}", file=sys.stderr, flush=True)
        if found:
            print(f"  {service.evidence()}", file=sys.stderr, flush=True)
        _make_ready(service, found)


def _round(service: Service, fault: Fault, dice: random.Random, tally: Tally) -> list[str]:
    """One fault and all that must be true after it; returns what was not."""
    start = time.monotonic()
    try:
        outcome = fault(service, dice)
    except LookupError as error:
        outcome = Outcome("", is_whole, problems=(str(error),))
    tally.rounds += 1
    problems = list(outcome.problems)
    lies, is_over = _watch(service, outcome)
    if is_over and not outcome.by_itself:
        problems += _leaks(service, tally) if outcome.is_clean else []
        code, _, err = service.run("restart", NAME)
        problems += [f"restart ended with {code}: {err.strip()}"] if code else []
        more, is_over = _watch(service, Outcome("restarted", is_whole))
        lies += more
    if is_over:
        tally.recovered += 1
        tally.seconds.append(time.monotonic() - start)
    else:
        problems.append(f"not over it after {service.patience_s:g} s: {outcome.what}")
    problems += _leaks(service, tally)
    tally.right += not lies
    return [f"{problem} [{outcome.what}]" for problem in (*problems, *lies)]


def _watch(service: Service, outcome: Outcome) -> tuple[list[str], bool]:
    """Look and ask until the fault is over; returns how `ps` was wrong for too long, and whether it is over."""
    lies: list[str] = []
    start = right = time.monotonic()
    while True:
        before, asked = service.look(), time.monotonic()
        row = service.ps()
        after = service.look()
        wrong = _wrong(row, before) and _wrong(row, after)
        if not wrong:
            right = asked
            settled = outcome.over(after) or isinstance(row, str)
            if settled and not (is_whole(after) and isinstance(row, dict) and row["phase"] != "ready"):
                return lies, True
        elif asked - right > RIGHT_S:
            lies.append(f"ps was wrong for {asked - right:.1f} s: {wrong}; ps says {row}")
            right = asked
        if time.monotonic() - start > service.patience_s:
            return lies, False
        time.sleep(0.1)


def _wrong(row: Row | str, look: Look) -> str:
    """What is not true of a row of `ps`; empty where all of it is."""
    if isinstance(row, str):
        return row
    phase, pid, scene = row["phase"], row["pid"], look.scene
    if phase == "ready" and not look.answers:
        return "it says ready, and no request is answered"
    orphaned = not scene.supervisors and not scene.guards
    may_answer = phase == "stopping" or (phase == "unhealthy" and scene.stopped) or (phase == "failed" and orphaned)
    if phase != "ready" and look.answers and not may_answer:
        return f"it says {phase}, and requests are answered"
    if pid is not None and pid not in {process.pid for process in scene.supervisors}:
        return f"it shows pid {pid}, which is no supervisor"
    if pid is None and phase in PHASES_UP and scene.supervisors:
        return "it shows no pid, and there is a supervisor"
    if phase in PHASES_UP and orphaned:
        return f"it says {phase}, and nobody supervises"
    if phase == "stopped" and scene.all:
        return f"it says stopped, and there is {scene}"
    return ""


def _leaks(service: Service, tally: Tally) -> list[str]:
    """What is left although it had time to go."""
    deadline = time.monotonic() + CLEAN_S
    while found := service.leaks():
        if time.monotonic() > deadline:
            tally.leaks += 1
            service.told |= set(found)
            return [f"leak: {leak}" for leak in found]
        time.sleep(0.2)
    return []


def _make_ready(service: Service, problems: list[str]) -> None:
    """A clean start for the next round: after a violation, and before the pauses between restarts grow long."""
    row = service.ps()
    tired = isinstance(row, dict) and row["restarts"] >= 2
    if not problems and not tired and is_whole(service.look()):
        return
    code, _, _ = service.run("restart", NAME)
    if code != 0:
        service.close()
        service.run("restart", NAME)
    deadline = time.monotonic() + service.patience_s
    while not is_whole(service.look()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the service cannot be started again: {service.evidence()}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
