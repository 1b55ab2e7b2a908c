"""Our embedding service, in the shipped configuration, beside sentence-transformers, naive FastAPI, infinity and vLLM.

The real all-MiniLM-L6-v2 in bfloat16, texts of 8 to 256 tokens (see texts.py). Servers have the first core, the
client the last. All models are loaded before the first round; systems take turns, in reverse order every other round.

offline  no server, strings to vectors on one core: ours packed (in order, in order with other token budgets, sorted
         by length) and padded, sentence-transformers in bfloat16 with batches of 16, 32 and 64, and in float32
single   requests of one text at 1, 8, 64 and 256 connections: texts a second, p50, p99, CPU ms a text of each process
many     requests of 32 texts at 4 connections
soak     --soak N: resident memory of our processes over N new texts, and MiB that 100,000 texts add

Every vector is compared with what plain transformers says of its text alone in float32: `cosine_min` is the least.
`share` is tokens a second over those of our packed model offline (the best of its ways) in the same round; `cpu_share`
is the same by seconds of CPU, those of all processes of a service: it says less, but bears a noisy machine.
Audit of each row: `client_core` is the client's share of its core, `foreign_core` what others took of the server's.
The last line is JSON; figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedding import environments, offline, online, processes, ratios, soak, systems
from embedding.texts import Text, corpus, words

Row = dict[str, Any]
SYSTEMS = ("mdeploy", "sentence-transformers", "naive", "infinity", "vllm")
MEASURES = ("offline", "single", "many")


@dataclass
class Bench:
    """Everything that is loaded, and what was measured so far: measure -> what -> a row a round."""

    asked: argparse.Namespace
    setup: systems.Setup
    texts: Sequence[Text]
    reference: Any
    waiting: dict[str, tuple[offline.Process, tuple[str, ...]]] = field(default_factory=dict)
    running: dict[str, systems.Running] = field(default_factory=dict)
    rows: dict[str, dict[str, list[Row]]] = field(default_factory=dict)

    def start(self, stack: contextlib.ExitStack, place: Path) -> None:
        """Load all models. Raises SystemExit with the log of a service that does not start."""
        if "offline" in self.asked.measures:
            for system in self.asked.systems:
                for kind, ways in offline.WAYS.get(system, {}).items():
                    self.waiting[kind] = stack.enter_context(offline.process(self.setup, kind)), ways
        if self.asked.soak or {"single", "many"} & set(self.asked.measures):
            for name in systems.installed([name for name in systems.NAMES if name in self.asked.systems]):
                self.running[name] = stack.enter_context(systems.serving(name, self.setup, place / name))

    def settings(self) -> Row:
        """How each system was told to run."""
        commands = {name: " ".join(running.command) for name, running in self.running.items()}
        return {**{kind: waiting.settings for kind, (waiting, _) in self.waiting.items()}, **commands}

    def round(self, number: int) -> None:
        """Everything once."""
        turns = list(self._turns(number))
        for measure, what, take in turns if number % 2 == 0 else reversed(turns):
            row = take()
            print(f"{measure:10} {what:12} {json.dumps(row)}", flush=True)
            self.rows.setdefault(measure, {}).setdefault(what, []).append(row)

    def _turns(self, number: int) -> list[tuple[str, str, Callable[[], Row]]]:
        turns: list[tuple[str, str, Callable[[], Row]]] = []
        for waiting, ways in self.waiting.values():
            turns += [("offline", way, self._offline(waiting, way)) for way in ways]
        for load in self._loads(number):
            kind = f"single-{load.connections}" if load.texts == 1 else "many"
            turns += [(kind, name, self._online(running, load)) for name, running in self.running.items()]
        return turns

    def _loads(self, number: int) -> list[online.Load]:
        first, seconds, loads = number * len(self.texts) // 3, self.asked.seconds, list[online.Load]()
        if "single" in self.asked.measures:
            loads += [online.Load(connections, 1, seconds, first) for connections in self.asked.connections]
        if "many" in self.asked.measures:
            loads.append(online.Load(4, 32, seconds, first))
        return loads

    def _offline(self, waiting: offline.Process, way: str) -> Callable[[], Row]:
        return lambda: offline.measure(waiting, way, self.texts, self.asked.seconds, self.reference)

    def _online(self, running: systems.Running, load: online.Load) -> Callable[[], Row]:
        return lambda: online.measure(running, load, self.texts, self.reference)


def main() -> None:
    """Measure, print a line a measurement and, last, one line of JSON."""
    asked = _asked()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # services are ended on the way out
    python = asked.python or environments.reference_python()
    setup = systems.Setup(asked.model or environments.minilm(), python, asked.dtype, asked.batch_tokens)
    texts = corpus(setup.model, asked.texts)
    os.sched_setaffinity(0, {processes.CLIENT_CORE})
    bench = Bench(asked, setup, texts, offline.reference(setup, texts, _cached(setup, texts)))
    result: Row = {"benchmark": "embed", "rounds": asked.rounds, "load_1m": round(os.getloadavg()[0], 2)}
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        bench.start(stack, place)
        result["settings"] = bench.settings()
        print(json.dumps(result), flush=True)
        for number in range(asked.rounds):
            bench.round(number)
        if asked.soak:
            ours = bench.running["mdeploy"]
            result["soak"] = soak.soak(ours, words(setup.model), texts, asked.soak, bench.reference)
    print(json.dumps({**result, **ratios.medians(bench.rows), "ratios": ratios.ratios(bench.rows)}))


def _cached(setup: systems.Setup, texts: Sequence[Text]) -> Path:
    """Where the reference of these texts lies: another model, another list or another interpreter has its own."""
    what = [str(setup.model), str(setup.python), *(text.text for text in texts)]
    weights = (setup.model / "model.safetensors").stat()
    key = hashlib.sha256("\n".join([*what, str(weights.st_size), str(weights.st_mtime_ns)]).encode()).hexdigest()[:16]
    return environments.CACHE / f"embed-reference-{key}.npy"


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load; offline at least all texts once")
    parser.add_argument("--texts", type=int, default=1024, help="in the list that every system gets, again and again")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--measures", nargs="*", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 8, 64, 256], help="of single texts")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="watch our memory over N texts (200000)")
    parser.add_argument("--model", type=Path, help="of BERT's kind with mean pooling, instead of all-MiniLM-L6-v2")
    parser.add_argument("--python", type=Path, help="interpreter of our workers, with torch and transformers")
    parser.add_argument("--dtype", default="bfloat16", help="of all services")
    parser.add_argument("--batch-tokens", type=int, help="of our workers, instead of what they measure at start")
    asked = parser.parse_args()
    if asked.soak and "mdeploy" not in asked.systems:
        parser.error("--soak watches mdeploy: put it among --systems")
    return asked


if __name__ == "__main__":
    main()
