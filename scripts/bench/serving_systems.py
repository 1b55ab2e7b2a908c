"""The systems under test, each started as its own documentation says, and what their processes cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from uv import find_uv_bin

from mdeploy.engines import pipconf

APPS = Path(__file__).parent / "serving_apps"
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]
PEERS = ("mosec==0.9.8", "litserve==0.2.19", "fastapi==0.165.0", "uvicorn[standard]==0.54.0")
NAMES = ("mdeploy", "mosec", "litserve", "fastapi")
KEY = "bench-key-of-no-value"
SERVICE = "bench"
START_S = 90.0


@dataclass(frozen=True)
class Model:
    """What is served: milliseconds a batch and an item, most items a batch, workers; raw bodies instead of JSON.

    `tells` makes workers keep files of what they compute, which costs more than an echo.
    """

    base_ms: float = 0.0
    item_ms: float = 0.0
    max_batch: int = 1
    workers: int = 1
    raw: bool = False
    tells: bool = False
    timeout_s: float = 60.0

    @property
    def ideal_rps(self) -> float:
        """Full batches without a pause on every worker."""
        return self.workers * self.max_batch / (self.base_ms + self.item_ms * self.max_batch) * 1000

    def environment(self) -> dict[str, str]:
        """As serving_apps/model.py reads it."""
        figures = {"BASE_MS": self.base_ms, "ITEM_MS": self.item_ms, "MAX_BATCH": self.max_batch}
        named = {f"BENCH_{name}": str(value) for name, value in {**figures, "WORKERS": self.workers}.items()}
        return {**named, **({"BENCH_RAW": "1"} if self.raw else {})}


@dataclass(frozen=True)
class Running:
    """One system that serves one model now. `place` is its directory, `state` where workers tell what they do."""

    name: str
    port: int
    model: Model
    place: Path
    token: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/inference" if self.name == "mosec" else "/predict"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def state(self) -> Path:
        return self.place / "state"

    def processes(self) -> list[psutil.Process]:
        """Every process of it: those with its token, and their descendants."""
        found = {p for p in psutil.process_iter() if _has(p, f"BENCH_RUN={self.token}")}
        for process in tuple(found):
            with contextlib.suppress(psutil.Error):
                found.update(process.children(recursive=True))
        return sorted(found, key=lambda p: p.pid)

    def cpu_s(self) -> float:
        """Seconds of CPU that its processes have used, the dead children they waited for included."""
        return sum(float(sum(times[:4])) for p in self.processes() if (times := _of(p, "cpu_times")))

    def memory(self) -> int:
        """Bytes of memory: proportional shares, so that what processes share counts once."""
        return sum(info.pss for p in self.processes() if (info := _of(p, "memory_full_info")))

    def workers(self) -> dict[int, int]:
        """Living worker processes, by pid, and the items each is computing."""
        return {int(file.name): int(file.read_text() or 0) for file in self.state.iterdir() if _lives(file.name)}

    def answers(self, body: bytes = b'{"n": 0}', timeout_s: float = 5.0) -> bool:
        """Whether it answers one request."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **self.headers})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False


def _has(process: psutil.Process, text: str) -> bool:
    try:
        return text.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _lives(pid: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _of(process: psutil.Process, what: str) -> Any:
    try:
        return getattr(process, what)()
    except psutil.Error:
        return None


def peers_python() -> Path:
    """The interpreter of an environment that has the peers, made at the first call and kept in ~/.cache."""
    key = hashlib.sha256(" ".join((*PEERS, sys.version)).encode()).hexdigest()[:16]
    place = Path.home() / ".cache" / "mdeploy-bench" / key
    python = place / "bin/python"
    if not (place / "complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        env = {**os.environ, **pipconf.uv_environment(pipconf.read())}
        uv = [find_uv_bin()]
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(place)], check=True, env=env)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(python), *PEERS], check=True, env=env)
        (place / "complete").touch()
    return python


@contextlib.contextmanager
def serving(name: str, model: Model) -> Iterator[Running]:
    """Start a system on the server's core, wait for an answer, end all of it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        headers = {"Authorization": f"Bearer {KEY}"} if name == "mdeploy" else {}
        running = Running(name, port, model, Path(directory), uuid.uuid4().hex, headers)
        running.state.mkdir()
        try:
            yield from _started(running)
        finally:
            _end(running)


def _started(running: Running) -> Iterator[Running]:
    with (running.place / "log").open("w") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *_command(running)],
            env=_environment(running),
            cwd=running.place,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        with process:
            deadline = time.monotonic() + START_S
            while not running.answers(b"0" if running.model.raw else b'{"n": 0}'):
                if time.monotonic() > deadline or process.poll():
                    raise SystemExit(f"{running.name} does not serve:\n{(running.place / 'log').read_text()[-4000:]}")
                time.sleep(0.1)
            if running.name == "mdeploy":
                process.wait(START_S)  # the command line is done, the service goes on
            yield running
            _end(running)


def _environment(running: Running) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MDEPLOY_", "MOSEC_", "BENCH_"))}
    own = {"MDEPLOY_HOME": str(running.place / "home"), "MDEPLOY_API_KEY": KEY, "PYTHONPATH": str(APPS)}
    return {**kept, **_told(running), **own}


def _told(running: Running) -> dict[str, str]:
    state = {"BENCH_STATE": str(running.state)} if running.model.tells else {}
    return {**running.model.environment(), "BENCH_RUN": running.token, **state}


def _command(running: Running) -> list[str]:
    port, model = str(running.port), running.model
    if running.name == "mosec":
        limits = ["--timeout", str(int(model.timeout_s * 1000)), "--log-level", "warning"]
        own = ["--path", str(running.place / "ipc"), "--address", "127.0.0.1", "--port", port]
        return [str(peers_python()), str(APPS / "mosec_app.py"), *own, *limits]
    if running.name == "litserve":
        return [str(peers_python()), str(APPS / "litserve_app.py"), port]
    if running.name == "fastapi":
        words = ["-m", "uvicorn", "fastapi_app:app", "--port", port, "--log-level", "warning", "--no-access-log"]
        return [str(peers_python()), *words]
    return _ours(running)


def _ours(running: Running) -> list[str]:
    """As a user starts it: in the background, supervised, with key, metrics and access log."""
    words = ["serve", "app", f"{APPS / 'mdeploy_app.py'}:Bench", "--name", SERVICE, "--port", str(running.port)]
    words += ["--gpus", "none", "--workers-per-gpu", str(running.model.workers)]
    words += ["--timeout", str(running.model.timeout_s), "-d"]
    words += [word for name, value in _told(running).items() for word in ("--env", f"{name}={value}")]
    return [sys.executable, "-m", "mdeploy", *words]


def _end(running: Running) -> None:
    if running.name == "mdeploy":
        stop = [sys.executable, "-m", "mdeploy", "stop", SERVICE]
        subprocess.run(stop, env=_environment(running), capture_output=True, timeout=60, check=False)
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = running.processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        _, left = psutil.wait_procs(left, timeout=5)
        if not left:
            return


def health(running: Running) -> dict[str, object]:
    """Our /health. Raises OSError where it is not answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/health", timeout=5) as response:
        return dict(json.load(response))
