"""The bundled mock server as a process of its own, and its log of what really happened."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def mock(*flags: str) -> Iterator[str]:
    """A mock that answers quickly unless told otherwise; gives its URL."""
    command = [sys.executable, "-m", "mdeploy.bench.mock", "--watch-stdin", "--ttft-ms", "5", "--itl-ms", "1"]
    with subprocess.Popen([*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["url"])
        finally:
            process.stdin.close()


def truth(url: str) -> list[dict[str, Any]]:
    """What the mock logged for the load; its first request was the trial."""
    with urllib.request.urlopen(f"{url}/truth") as response:
        rows = [json.loads(line) for line in response]
    return [row for row in rows if row["number"] > 1]
