"""A served class, in the shipped configuration, beside the same model under mosec, LitServe and plain FastAPI.

The server has the first core, the client the last. Systems take turns (A B A B) and figures are medians.

batching   10 ms + 0.5 ms an item, at most 32: share of the ideal, 1 and 2 workers, 64 and 128 connections
large      the same with 4 MiB each way: what memory and sockets leave of it
open       Poisson arrivals at 70 % of the ideal: p50 and p99 from when a request was due
echo       no model at all: requests a second, and CPU ms a request of all processes of the service
idle       two batch workers with nothing to do: share of a core
scaling    a model of 77 ms: 4 workers over 1
crash      kill -9 one of two workers under 16 clients, with at least 2 requests in it: failed, wrong
stop       SIGSTOP one of two: seconds until it is replaced
overload   2000 clients on 26 requests a second: how fast the others are shed, goodput, memory afterwards

The last line is JSON. Ours runs as `mdeploy serve app … -d` with a key, metrics and the access log; its supervisor's
CPU and memory count too. The peers run as their documentation says, without keys; batchers wait at most 10 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import serving_faults as faults
from serving_client import Client, open_loop
from serving_systems import APPS, CLIENT_CORE, KEY, NAMES, Model, Running, serving

Row = dict[str, Any]
LARGE = 4 << 20
BATCHERS = ("mdeploy", "mosec", "litserve")


def main() -> None:
    """Measure, print a line a measurement and, last, one line of JSON."""
    asked = _asked()
    os.sched_setaffinity(0, {CLIENT_CORE})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    result: Row = {"benchmark": "serving", "rounds": asked.rounds, "load_1m": round(os.getloadavg()[0], 2)}
    for name in asked.measures:
        systems = [system for system in _MEASURES[name][1] if system in asked.systems]
        result[name] = _interleaved(name, systems, asked)
    print(json.dumps({**result, **_ratios(result)}))


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurements of speed; faults run once")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--kills", type=int, default=20, help="of our workers; peers get 3")
    parser.add_argument("--clients", type=int, default=2000, help="of the overload")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--measures", nargs="+", choices=_MEASURES, default=list(_MEASURES))
    return parser.parse_args()


def _interleaved(name: str, systems: list[str], asked: argparse.Namespace) -> Row:
    measure, _, rounds = _MEASURES[name]
    rows: dict[str, list[Row]] = {system: [] for system in systems}
    for _ in range(asked.rounds if rounds else 1):
        for system in systems:
            row = measure(system, asked)
            print(f"{name:9} {system:9} {json.dumps(row)}", flush=True)
            rows[system].append(row)
    return {system: _median(found) for system, found in rows.items()}


def _median(rows: list[Row]) -> Row:
    """Figure by figure; of what is no number, the first."""
    first = rows[0]
    return {
        key: round(statistics.median(row[key] for row in rows), 4) if isinstance(value, (int, float)) else value
        for key, value in first.items()
    }


def _ratios(result: Row) -> Row:
    """Ours over mosec's, where both were measured."""
    pairs = {"batching": "1x64", "echo": "cpu_ms", "open": "1_p99_ms"}
    found: Row = {}
    for measure, figure in pairs.items():
        ours, theirs = (result.get(measure, {}).get(name, {}).get(figure) for name in ("mdeploy", "mosec"))
        if ours and theirs:
            found[f"{measure}_ratio"] = round(ours / theirs, 3)
    return found


def _wrk(running: Running, connections: int, seconds: float, body: bytes) -> Row:
    """One run of wrk. Raises RuntimeError where an answer was an error."""
    file = running.place / "body"
    file.write_bytes(body)
    kind = "application/octet-stream" if running.model.raw else "application/json"
    env = {**os.environ, "BENCH_BODY": str(file), "BENCH_TYPE": kind}
    if running.headers:
        env["BENCH_KEY"] = KEY
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(APPS / "post.lua")]
    done = subprocess.run([*words, running.url], env=env, capture_output=True, text=True, check=True)
    row: Row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("wrk-json"))[9:])
    if row["errors"]:
        print(f"          {running.name}: {row['errors']} of {row['requests']} failed", flush=True)
    return {**row, "rps": row["requests"] / row["seconds"]}


def _warm(running: Running, connections: int, body: bytes = b'{"n": 1}') -> None:
    _wrk(running, connections, 1, body)


def _batching(name: str, asked: argparse.Namespace) -> Row:
    row: Row = {}
    for workers in (1, 2):
        model = Model(base_ms=10, item_ms=0.5, max_batch=32, workers=workers)
        with serving(name, model) as running:
            for connections in (64, 128):
                _warm(running, connections)
                seen = _wrk(running, connections, asked.seconds, b'{"n": 1}')
                row[f"{workers}x{connections}"] = round(seen["rps"] / model.ideal_rps, 3)
    return row


def _large(name: str, asked: argparse.Namespace) -> Row:
    row: Row = {}
    for workers in (1, 2):
        model = Model(base_ms=10, item_ms=0.5, max_batch=32, workers=workers, raw=True)
        with serving(name, model) as running:
            body = os.urandom(LARGE)
            _warm(running, 64, body)
            seen = _wrk(running, 64, asked.seconds, body)
        row[f"{workers}_share"] = round(seen["rps"] / model.ideal_rps, 4)
        row[f"{workers}_rps"] = round(seen["rps"], 1)
    return row


def _open(name: str, asked: argparse.Namespace) -> Row:
    row: Row = {}
    for workers in (1, 2):
        model = Model(base_ms=10, item_ms=0.5, max_batch=32, workers=workers)
        with serving(name, model) as running:
            _warm(running, 32)
            client = Client(running.url, running.headers)
            seen = asyncio.run(_opened(client, 0.7 * model.ideal_rps, asked.seconds))
        row.update({f"{workers}_{key}": value for key, value in seen.items()})
    return row


async def _opened(client: Client, rps: float, seconds: float) -> Row:
    try:
        return await open_loop(client, rps, seconds)
    finally:
        client.close()


def _echo(name: str, asked: argparse.Namespace) -> Row:
    with serving(name, Model()) as running:
        _warm(running, 32)
        before = running.cpu_s()
        seen = _wrk(running, 32, asked.seconds, b'{"n": 1}')
        used = running.cpu_s() - before
    return {"rps": round(seen["rps"]), "cpu_ms": round(used / seen["requests"] * 1000, 4), "p99_ms": seen["p99_ms"]}


def _idle(name: str, asked: argparse.Namespace) -> Row:
    with serving(name, Model(base_ms=10, item_ms=0.5, max_batch=32, workers=2)) as running:
        time.sleep(3)  # what a start leaves behind is no idling
        before, begun = running.cpu_s(), time.monotonic()
        time.sleep(2.5 * asked.seconds)
        return {"core_percent": round((running.cpu_s() - before) / (time.monotonic() - begun) * 100, 3)}


def _scaling(name: str, asked: argparse.Namespace) -> Row:
    rps = []
    for workers in (1, 4):
        with serving(name, Model(base_ms=77, workers=workers)) as running:
            _warm(running, 16)
            rps.append(_wrk(running, 16, 2 * asked.seconds, b'{"n": 1}')["rps"])
    return {"rps_1": round(rps[0], 2), "rps_4": round(rps[1], 2), "times": round(rps[1] / rps[0], 3)}


def _crash(name: str, asked: argparse.Namespace) -> Row:
    return faults.crash(name, asked.kills if name == "mdeploy" else min(asked.kills, 3))


def _stop(name: str, _: argparse.Namespace) -> Row:
    return faults.stopped(name)


def _overload(name: str, asked: argparse.Namespace) -> Row:
    return faults.overload(name, asked.clients, 2.5 * asked.seconds)


# what to call it -> the measurement, the systems it is for, whether it is repeated
_MEASURES: dict[str, tuple[Callable[[str, argparse.Namespace], Row], tuple[str, ...], bool]] = {
    "batching": (_batching, BATCHERS, True),
    "large": (_large, ("mdeploy", "mosec"), True),
    "open": (_open, BATCHERS, True),
    "echo": (_echo, NAMES, True),
    "idle": (_idle, BATCHERS, False),
    "scaling": (_scaling, BATCHERS, True),
    "crash": (_crash, BATCHERS, False),
    "stop": (_stop, ("mdeploy", "mosec"), False),
    "overload": (_overload, BATCHERS, False),
}

if __name__ == "__main__":
    main()
