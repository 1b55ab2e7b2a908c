"""Measure the measurer: `mdeploy bench` against the mock's log of what really happened.

The mock (TTFT 50 ms, 20 ms between chunks) has the first core, the client the last. Per repetition and number
of streams it compares what the client reports with what the mock logged for the same requests: from the
kernel's receipt of the request to just before a token chunk was sent. The last line is JSON; its
`ttft_p50_error_ms` are medians over the repetitions, the aim is 1 ms or less at 64 and 256 streams.
Other work on the two cores disturbs it: `load_1m` is the machine's load when the script began.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = str(CORES[0]), str(CORES[-1])
Row = dict[str, Any]


def main() -> int:
    """Run all repetitions, interleaved, and print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--waves", type=int, default=4, help="requests per stream, at least 512 requests")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    print(f"{'streams':>7} {'rep':>3}  " + "  ".join(f"{name:>22}" for name in FIGURES))
    for repetition in range(asked.repetitions):
        for streams in asked.streams:
            row = measure(streams, max(512, streams * asked.waves), asked.chunks)
            rows.append(row)
            cells = (f"{row[name][0]:8.2f} /{row[name][1]:8.2f} ms" for name in FIGURES)
            print(f"{streams:>7} {repetition:>3}  " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)
    print("each cell: reported / true")
    print(json.dumps(summary(rows, asked.streams, load)))
    return 0


FIGURES = ("ttft_p50", "ttft_p99", "inter_chunk_p50", "inter_chunk_p99")


def measure(streams: int, requests: int, chunks: int) -> Row:
    """One run: figure -> (reported, true), and what the audit thought of it."""
    with mock() as url:
        result = bench(url, streams, requests, chunks)
        true = truth(url, requests)
    row: Row = {"streams": streams, "valid": result["audit"]["valid"], "worker_cpu": result["audit"]["worker_cpu"]}
    row["lag_p99"] = result["audit"]["client_lag_ms"]["p99"]
    for name in FIGURES:
        metric, _, quantile = name.rpartition("_")
        row[name] = (result["latency_ms"][metric][quantile], true[name])
    return row


@contextmanager
def mock() -> Iterator[str]:
    """The mock server on its core; it ends with the block, or with us."""
    command = ["taskset", "-c", SERVER_CORE, sys.executable, "-m", "mdeploy.bench.mock", "--watch-stdin"]
    command += ["--ttft-ms", "50", "--itl-ms", "20"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.stdin.close()


def bench(url: str, streams: int, requests: int, chunks: int) -> Row:
    """The command a user would type, on its core. Status 6 (audit) is a result, too."""
    command = ["taskset", "-c", CLIENT_CORE, sys.executable, "-m", "mdeploy", "bench", url, "--json"]
    command += ["-c", str(streams), "-n", str(requests), "--output-tokens", str(chunks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode not in (0, 6):
        raise SystemExit(f"mdeploy bench failed ({done.returncode}): {done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout))


def truth(url: str, requests: int) -> dict[str, float]:
    """Percentiles of what the mock logged; the first request was the trial one."""
    with urllib.request.urlopen(f"{url}/truth") as response:
        rows = [json.loads(line) for line in response]
    load = [row for row in rows if row["number"] > 1]
    assert len(load) == requests, (len(load), requests)
    first = [(row["sent_ns"][0] - row["received_ns"]) / 1e6 for row in load]
    gaps = [(b - a) / 1e6 for row in load for a, b in zip(row["sent_ns"], row["sent_ns"][1:], strict=False)]
    figures = {}
    for name, values in (("ttft", first), ("inter_chunk", gaps)):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        figures[f"{name}_p50"], figures[f"{name}_p99"] = cuts[49], cuts[98]
    return figures


def summary(rows: list[Row], streams: list[int], load: float) -> Row:
    """Median absolute errors in ms, and the reported over the true value, per number of streams."""
    out: Row = {"load_1m": round(load, 2)}
    for number in streams:
        mine = [row for row in rows if row["streams"] == number]
        cell: Row = {"valid": f"{sum(row['valid'] for row in mine)}/{len(mine)}"}
        cell["worker_cpu"] = round(statistics.median(row["worker_cpu"] for row in mine), 3)
        cell["client_lag_p99_ms"] = round(statistics.median(row["lag_p99"] for row in mine), 3)
        for name in FIGURES:
            pairs = [row[name] for row in mine]
            cell[f"{name}_error_ms"] = round(statistics.median(abs(a - b) for a, b in pairs), 3)
            cell[f"{name}_ratio"] = round(statistics.median(a / b for a, b in pairs), 4)
        out[str(number)] = cell
    return out


if __name__ == "__main__":
    sys.exit(main())
