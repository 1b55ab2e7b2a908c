"""Starts `embed_server.py` and asks it what it saw."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support import free_port


@dataclass
class Fake:
    """One that runs."""

    url: str
    process: subprocess.Popen[str]

    def most_at_once(self) -> int:
        return int(httpx.get(f"{self.url}/health", trust_env=False).json()["most"])


@contextmanager
def service(*words: str, port: int | None = None) -> Iterator[Fake]:
    """`words` are those of its command line."""
    port = port or free_port()
    script = str(Path(__file__).with_name("embed_server.py"))
    command = [sys.executable, script, str(port), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        try:
            yield Fake(f"http://127.0.0.1:{port}", process)
        finally:
            process.kill()
