"""The same model without a server: processes on the server's core that wait until it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedding import environments, processes
from embedding.systems import Setup
from embedding.texts import Text

_WORKER = Path(__file__).with_name("offline_worker.py")
# system -> its ways of running, each a process with the model in it: process -> [ways]
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "mdeploy": {"ours": ("packed", "packed-sorted", "packed-1024", "packed-2048", "packed-4096", "padded-sorted")},
    "sentence-transformers": {"st-bf16": ("st-bf16-16", "st-bf16-32", "st-bf16-64"), "st-fp32": ("st-fp32-32",)},
}


@dataclass(frozen=True)
class Process:
    """One model that waits in one process."""

    popen: subprocess.Popen[str]
    settings: dict[str, Any]

    def ask(self, **what: Any) -> dict[str, Any]:
        """Raises RuntimeError where it ended instead of answering; why is on stderr."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write(json.dumps(what) + "\n")
        self.popen.stdin.flush()
        return _line(self.popen)


def _line(popen: subprocess.Popen[str]) -> dict[str, Any]:
    assert popen.stdout is not None
    line = popen.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(map(str, popen.args))} ended with {popen.wait()}")  # type: ignore[arg-type]
    return dict(json.loads(line))


@contextlib.contextmanager
def process(setup: Setup, kind: str, core: int = processes.SERVER_CORE) -> Iterator[Process]:
    """Start one and wait until its model is loaded."""
    own = json.dumps({"dtype": setup.dtype, "batch_tokens": setup.batch_tokens})
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["MDEPLOY_EMBED"] = own
    python = environments.reference_python() if kind.startswith("st-") else setup.python
    words = ["taskset", "-c", str(core), str(python), str(_WORKER), kind, str(setup.model)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as popen:
        assert popen.stdin is not None
        try:
            yield Process(popen, _line(popen))
        finally:
            popen.stdin.close()
            try:
                popen.wait(15)
            except subprocess.TimeoutExpired:
                popen.kill()


def measure(process: Process, way: str, texts: Sequence[Text], seconds: float, reference: Any) -> dict[str, Any]:
    """Texts and tokens a second of one way, and how near its vectors are to the reference."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        file = Path(directory) / "vectors.npy"
        own, begun = {process.popen.pid: way}, time.perf_counter()
        before = processes.spent(own)
        done = process.ask(way=way, texts=[text.text for text in texts], seconds=seconds, file=str(file))
        used, took = processes.spent(own).since(before), time.perf_counter() - begun
        vectors = np.load(file)
    wall, tokens = done["seconds"], done["rounds"] * sum(text.tokens for text in texts)
    return {
        "texts_s": round(done["rounds"] * len(texts) / wall, 2),
        "tokens_s": round(tokens / wall, 1),
        "tokens_cpu_s": round(tokens / done["cpu_s"], 1),
        "cosine_min": cosine_min(vectors, reference),
        "foreign_core": round((used.foreign + used.stolen) / took, 3),
    }


def cosine_min(vectors: Any, reference: Any) -> float:
    """Of each row with its own row there, the least."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return float(round(float(((vectors * reference).sum(axis=1) / lengths).min()), 6))


def reference(setup: Setup, texts: Sequence[Text], cached: Path) -> Any:
    """What plain transformers says of each text alone, in float32; kept in `cached`."""
    if not cached.exists():
        with process(setup, "reference", processes.CLIENT_CORE) as alone:
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(".partial.npy")
            alone.ask(way="reference", texts=[text.text for text in texts], seconds=0, file=str(partial))
            partial.rename(cached)
    return np.load(cached)
