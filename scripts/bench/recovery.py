"""What a crash and a restart cost, as multiples of a bare engine start: real vLLM on the CPU, medians, interleaved.

bare      the engine's own command line, started by hand, until its first answered completion
crash     kill -9 of the engine core of a ready service, until the service's next answered completion
restart   `mdeploy restart`, from the last answered completion to the next one

A request goes out every 50 ms. The last line is JSON; the aim is that supervision adds little to the bare start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import chaos_scan as scan
from chaos_faults import is_helper
from chaos_service import NAME, Service, kill, real_vllm, stand_in

_PAUSE_S = 0.05


def main() -> None:
    """Measure, print a line a repetition and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--engines-home", type=Path, help="an MDEPLOY_HOME that has vLLM; else it is installed")
    parser.add_argument("--stand-in", action="store_true", help="with the tests' stand-in engine: only a rehearsal")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `finally`
    load = os.getloadavg()[0]
    with stand_in() if asked.stand_in else real_vllm(asked.engines_home) as service:
        bare(service)  # fills the page cache, and is not counted
        service.serve("-d")
        rounds = [_round(service) for _ in range(asked.runs)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratios = {f"{name}_ratio": round(medians[name] / medians["bare"], 2) for name in ("crash", "restart")}
    seconds = {f"{name}_s": round(value, 2) for name, value in medians.items()}
    print(json.dumps({"benchmark": "recovery", "runs": asked.runs, "load_1m": round(load, 2), **seconds, **ratios}))


def _round(service: Service) -> dict[str, float]:
    """Each of the three once; the service is stopped while the bare engine has its port."""
    service.must("stop", NAME)
    figures = {"bare": bare(service)}
    service.must("restart", NAME)
    figures["crash"] = crash(service)
    figures["restart"] = restart(service)
    print("  ".join(f"{name} {value:6.2f} s" for name, value in figures.items()), flush=True)
    return figures


def bare(service: Service) -> float:
    """Seconds from exec to the first answer."""
    described = json.loads(service.serve("--dry-run", "--json"))["service"]
    start = time.monotonic()
    with _engine(service, described["argv"], described["env"]):
        _until(service, lambda: _answers(service), "the bare engine answers")
        return time.monotonic() - start


@contextmanager
def _engine(service: Service, argv: list[str], env: dict[str, str]) -> Iterator[None]:
    """The engine by hand; all of it is gone at the end, found by a marker as the scan does."""
    path = f"{Path(argv[0]).parent}{os.pathsep}{os.environ['PATH']}"
    marked = {**service.environment(), **env, "PATH": path, "MDEPLOY_RUN_ID": "bare", "SPT_NOENV": "1"}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(argv, env=marked, stdin=nowhere, stdout=nowhere, stderr=nowhere) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)
            _until(service, lambda: _all_killed(service), "the bare engine is gone")


def _all_killed(service: Service) -> bool:
    left = scan.scene(service.home).engines
    for process in left:
        kill(process.pid, signal.SIGKILL)
    return not left


def crash(service: Service) -> float:
    """Seconds from the death of an engine core to an answer of the next run."""
    scene = scan.scene(service.home)
    core = next(p for p in scene.engines if p not in scene.servers and not is_helper(p))
    start = time.monotonic()
    kill(core.pid, signal.SIGKILL)

    def answers() -> bool:
        return not scan.scene(service.home).runs & scene.runs and _answers(service)

    _until(service, answers, "the next run answers")
    return time.monotonic() - start


def restart(service: Service) -> float:
    """Seconds without an answer while `mdeploy restart` runs."""
    last = time.monotonic()

    def is_down() -> bool:
        nonlocal last
        answered = _answers(service)
        last = time.monotonic() if answered else last
        return not answered

    with service.begin("restart", NAME) as command:
        _until(service, is_down, "the old engine is gone")
        _until(service, lambda: _answers(service), "the new engine answers")
        downtime = time.monotonic() - last
        _, err = command.communicate(timeout=service.patience_s)
    if command.returncode != 0:
        raise RuntimeError(f"mdeploy restart: {err}")
    return downtime


def _answers(service: Service) -> bool:
    return scan.answers(service.port, NAME, service.request_s)


def _until(service: Service, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + service.patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {service.patience_s:g} s: {what}")
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
