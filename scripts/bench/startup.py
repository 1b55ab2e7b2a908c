"""Wall time of `mdeploy --help` and `mdeploy ps` as multiples of `python -c pass`, medians of interleaved runs.

`typer` is a program of one empty command with one option: what the framework itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_TYPER = """
import typer
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
@app.callback()
def root() -> None: ...
@app.command()
def ps(json: bool = False) -> None: ...
app(["ps"])
"""

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "typer": [sys.executable, "-c", _TYPER],
    "help": [str(Path(sys.executable).parent / "mdeploy"), "--help"],
    "ps": [str(Path(sys.executable).parent / "mdeploy"), "ps"],
}


def _milliseconds(command: list[str], env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Measure, print a table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "MDEPLOY_HOME": home}
        rounds = [{name: _milliseconds(c, env) for name, c in COMMANDS.items()} for _ in range(runs + 1)]
    medians = {name: statistics.median(r[name] for r in rounds[1:]) for name in COMMANDS}
    for name, value in medians.items():
        print(f"{name:8}{value:8.1f} ms{value / medians['python']:8.1f} x")
    ratios = {f"{name}_ratio": round(medians[name] / medians["python"], 2) for name in ("typer", "help", "ps")}
    print(
        json.dumps(
            {"benchmark": "startup", "runs": runs, **{f"{n}_ms": round(v, 1) for n, v in medians.items()}, **ratios}
        )
    )


if __name__ == "__main__":
    main()
