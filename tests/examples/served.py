"""An example as its README has it served: from the recipe, in the background, asked by its own client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import support

EXAMPLES = support.REPO / "recipes/examples"


@dataclass(frozen=True)
class Service:
    """One example that runs, with a home of its own: it is shared by tests, whose homes end with them."""

    name: str
    url: str
    home: Path
    key: str = ""

    def query(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Its query.py, as a user runs it."""
        script = EXAMPLES / self.name / "query.py"
        command = [sys.executable, str(script), *map(str, words), "--url", self.url]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "MDEPLOY_API_KEY": self.key},
            check=False,
        )

    def post(self, path: str, **options: Any) -> httpx.Response:
        """One request to it."""
        with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {self.key}"} if self.key else {}) as client:
            return client.post(f"{self.url}{path}", **options)

    def pids(self) -> set[int]:
        """Its workers."""
        handlers = httpx.get(f"{self.url}/health", timeout=10).json()["handlers"]
        return {worker["pid"] for one in handlers.values() for worker in one["workers"]}


@contextmanager
def example(name: str, home: Path, *words: str | Path, **env: Any) -> Iterator[Service]:
    """`mdeploy serve app recipe.yaml -d`, until it has answered; nothing of it is left at the end."""
    port = support.free_port()
    command = ("serve", "app", EXAMPLES / name / "recipe.yaml", "--port", str(port), "-d", *words)
    started = support.mdeploy(*command, MDEPLOY_HOME=str(home), **env)
    try:
        log = support.mdeploy("logs", name, "-n", "50", MDEPLOY_HOME=str(home)).stdout if started.code else ""
        assert started.code == 0, started.stderr + log
        yield Service(name, f"http://127.0.0.1:{port}", home, env.get("MDEPLOY_API_KEY", ""))
    finally:
        stopped = support.mdeploy("stop", "--all", MDEPLOY_HOME=str(home))
    assert stopped.code == 0, stopped.stderr
    assert support.processes_with(f"MDEPLOY_HOME={home}") == []
