"""The services under test, each started as its own documentation says, in bfloat16, all on the server's core."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from embedding import environments, processes

NAMES = ("mdeploy", "naive", "infinity", "vllm")
MODEL_NAME = "minilm"
_KEY = "bench-key-of-no-value"
_START_S = 300.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Setup:
    """What all of them serve. `python` is the interpreter of our own workers, `batch_tokens` their budget."""

    model: Path
    python: Path
    dtype: str
    batch_tokens: int | None


@dataclass(frozen=True)
class Running:
    """One service that answers. `pids` are its processes: pid -> what it does."""

    name: str
    url: str
    command: tuple[str, ...]
    pids: dict[int, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {_KEY}"} if self.name == "mdeploy" else {}

    def answers(self, body: bytes) -> bool:
        """Whether it answers one request."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **self.headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False


@contextlib.contextmanager
def serving(name: str, setup: Setup, place: Path) -> Iterator[Running]:
    """Start a service, wait until it answers, end all of it. `place` is a directory for it."""
    place.mkdir()
    token, port = uuid.uuid4().hex, _free_port()
    command = _COMMANDS[name](setup, port)
    running = Running(name, f"http://127.0.0.1:{port}{_PATHS.get(name, '/v1/embeddings')}", command)
    with processes.ended(token), (place / "log").open("w") as log:
        words = ["taskset", "-c", str(processes.SERVER_CORE), *command]
        env = _environment(token, place)
        with subprocess.Popen(words, env=env, cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as popen:
            try:
                _wait(running, popen, place / "log")
                yield Running(name, running.url, command, processes.of(token))
            finally:
                _end(popen)


def _wait(running: Running, popen: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not running.answers(b'{"model": "%s", "input": ["a text"]}' % MODEL_NAME.encode()):
        if time.monotonic() > deadline or popen.poll() is not None:
            raise SystemExit(f"{running.name} does not serve:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)


def _end(popen: subprocess.Popen[bytes]) -> None:
    popen.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(_STOP_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(token: str, place: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MDEPLOY_", "BENCH_", "INFINITY_", "VLLM_"))}
    ours = {"MDEPLOY_HOME": str(place / "home"), "MDEPLOY_API_KEY": _KEY}
    # All of them see one core, and none shall ask a hub for what it has, nor tell anybody that it runs.
    peers = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**kept, **ours, **peers, processes.TOKEN: token}


def _ours(setup: Setup, port: int) -> tuple[str, ...]:
    """As a user starts it: supervised, with key, metrics and access log."""
    words = ("serve", "embed", str(setup.model), "--name", MODEL_NAME, "--port", str(port), "--gpus", "none")
    budget = ("--batch-tokens", str(setup.batch_tokens)) if setup.batch_tokens else ()
    return (sys.executable, "-m", "mdeploy", *words, *budget, "--dtype", setup.dtype, "--python", str(setup.python))


def _naive(setup: Setup, port: int) -> tuple[str, ...]:
    app = Path(__file__).with_name("naive_app.py")
    return (str(environments.reference_python()), str(app), str(setup.model), str(port))


def _infinity(setup: Setup, port: int) -> tuple[str, ...]:
    words = ("v2", "--model-id", str(setup.model), "--served-model-name", MODEL_NAME, "--port", str(port))
    own = ("--device", "cpu", "--engine", "torch", "--dtype", setup.dtype, "--log-level", "warning")
    return (str(environments.infinity()), *words, "--host", "127.0.0.1", *own)


def _vllm(setup: Setup, port: int) -> tuple[str, ...]:
    words = ("serve", str(setup.model), "--served-model-name", MODEL_NAME, "--port", str(port))
    own = ("--runner", "pooling", "--dtype", setup.dtype, "--no-enable-prefix-caching")
    return (str(environments.vllm()), *words, "--host", "127.0.0.1", *own)


_COMMANDS = {"mdeploy": _ours, "naive": _naive, "infinity": _infinity, "vllm": _vllm}
_PATHS = {"infinity": "/embeddings"}


def installed(names: list[str]) -> list[str]:
    """Without vLLM where its engine for CPUs is not installed."""
    return [name for name in names if name != "vllm" or environments.vllm() is not None]
