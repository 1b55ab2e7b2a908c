"""The main process of an app service alone, without its supervisor: early signals, calls to end, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from tests.support import free_port, until

APP = """
import os
from mdeploy import Handler

class Pid(Handler):
    def inference(self, request):
        if request.json() == "fail":
            raise RuntimeError("it fails")
        return os.getpid()
"""


@contextmanager
def app(spec: str, port: int, log: IO[Any] | int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    words = ["--service", "lab", "--host", "127.0.0.1", "--port", str(port), "--handler", spec]
    line = [sys.executable, "-m", "mdeploy.apps", "app", *words]
    with subprocess.Popen(line, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()


def ask(port: int, order: Any) -> httpx.Response | None:
    try:
        return httpx.post(f"http://127.0.0.1:{port}/pid", content=json.dumps(order), trust_env=False, timeout=20)
    except httpx.TransportError:
        return None


def ignores(pid: int, number: int) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool((int(status["SigIgn"], 16) | int(status["SigCgt"], 16)) >> (number - 1) & 1)


def test_a_signal_that_comes_before_anybody_heeds_it_does_not_end_the_service(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(APP)
    port = free_port()
    with app(f"{tmp_path}/a.py:Pid", port) as process:
        until(lambda: ignores(process.pid, signal.SIGUSR1))
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGHUP)
        until(lambda: ask(port, 1))
        process.terminate()
        assert process.wait(20) == 0


def test_one_that_is_told_to_end_while_it_looks_for_handlers_ends(tmp_path: Path) -> None:
    module, begun = tmp_path / "a.py", tmp_path / "begun"
    module.write_text(f"import time\nfrom pathlib import Path\nPath({str(begun)!r}).touch()\ntime.sleep(600)\n")
    with app(str(module), free_port()) as process:
        until(begun.exists)
        process.terminate()
        assert process.wait(20) == 0


def test_a_log_whose_disk_is_full_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(APP)
    port = free_port()
    with Path("/dev/full").open("wb") as full, app(f"{tmp_path}/a.py:Pid", port, full):
        first = until(lambda: ask(port, 1)).json()
        failed = ask(port, "fail")
        assert failed is not None
        assert failed.status_code == 500
        assert until(lambda: ask(port, 1)).json() == first
        os.kill(first, signal.SIGKILL)
        assert until(lambda: ask(port, 1)).json() != first
