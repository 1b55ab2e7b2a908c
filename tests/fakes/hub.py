"""Hubs for tests: a small model, the project's own mirror in a thread, and the faulty front as a process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdeploy.hub.mirror import create_server

MODEL = "demo/tiny-1.5"
BIG = "model.safetensors"
BIG_BYTES = 3_000_001
FILES: dict[str, bytes] = {
    "config.json": b'{"model_type": "tiny"}',
    "configuration.json": b'{"task": "text-generation"}',
    BIG: random.Random(7).randbytes(BIG_BYTES),
    "sub/deeper/vocab.txt": b"a\nb\n",
    "说明 & notes+1.md": "一个很小的模型".encode(),
    "empty.txt": b"",
    ".gitattributes": b"*.safetensors filter=lfs\n",
}
TOTAL = sum(map(len, FILES.values()))


def make_model(root: Path, model: str = MODEL, files: dict[str, bytes] | None = None) -> Path:
    """Write a model as OWNER/NAME below `root`."""
    directory = root / model
    for name, content in (FILES if files is None else files).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@contextmanager
def mirror(root: Path) -> Iterator[str]:
    """The project's mirror on a free port; yields its URL."""
    server = create_server(root)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Front:
    """The faulty front."""

    url: str
    process: subprocess.Popen[str]

    def log(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/_log") as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found

    def asked(self, text: str) -> int:
        """How many requests held this text in their target."""
        return sum(text in entry["target"] for entry in self.log())


@contextmanager
def front(upstream: str, fault: str, on: str = "", times: int = -1) -> Iterator[Front]:
    """`hub_faults.py` before a mirror."""
    script = str(Path(__file__).with_name("hub_faults.py"))
    command = [sys.executable, script, upstream, "--fault", fault, "--on", on, "--times", str(times)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Front(process.stdout.readline().strip(), process)
        finally:
            process.kill()


def environment(**extra: str) -> dict[str, str]:
    """The test's environment with a HOME of its own."""
    return {**os.environ, "HOME": str(Path(os.environ["MDEPLOY_HOME"]).parent), **extra}
