"""A service as its user starts it, for tests that look at it from outside: `mdeploy serve app` and HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support import free_port, listens, processes_with, until

HANDLERS = Path(__file__).parent / "handlers"
LAB = HANDLERS / "lab.py"
START_S = 40.0


@dataclass
class Service:
    """One running service. `lab` is the directory where its handlers note what they do."""

    place: Path
    port: int
    process: subprocess.Popen[str]
    key: str | None = None

    @property
    def lab(self) -> Path:
        return self.place / "lab"

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def log(self) -> str:
        return (self.place / "out").read_text(errors="replace")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def ask(self, path: str, item: Any = None, *, method: str = "POST", timeout: float = 30, **more: Any) -> Any:
        """One request on a connection of its own; `item` goes as JSON."""
        body = {"json": item} if item is not None else {}
        url, headers = f"http://127.0.0.1:{self.port}{path}", {**self.headers, **more.pop("headers", {})}
        return httpx.request(method, url, timeout=timeout, headers=headers, trust_env=False, **body, **more)

    def ask_all(self, path: str, items: Sequence[Any]) -> list[Any]:
        """All at once; answers in the order of the items."""
        with ThreadPoolExecutor(len(items)) as threads:
            return list(threads.map(lambda item: self.ask(path, item), items))

    def connect(self, path: str, item: Any) -> socket.socket:
        """A request on a bare connection, whose answer nobody has read yet."""
        body = json.dumps(item).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: t", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return sock

    def health(self) -> Any:
        return self.ask("/health", method="GET").json()

    def workers(self, handler: str) -> list[Any]:
        """Those that can work, as /health shows them."""
        found = self.health()["handlers"][handler]["workers"]
        return [worker for worker in found if worker["state"] in ("ready", "busy")]

    def pids(self, handler: str) -> set[int]:
        return {worker["pid"] for worker in self.workers(handler)}

    def noted(self, file: str) -> list[str]:
        """Lines that handlers have written."""
        path = self.lab / file
        return path.read_text().splitlines() if path.exists() else []

    def computing(self, pid: int) -> int:
        """How many items a worker is at; for a dead one, was at."""
        path = self.lab / f"worker-{pid}"
        return int(path.read_text() or 0) if path.exists() else 0

    def signal_computing(self, handler: str, number: signal.Signals) -> int:
        """Send a signal to a worker while it has at least two items in its model; returns its pid."""
        while True:
            pid = until(
                lambda: next((p for p in self.pids(handler) if self.computing(p) >= 2), None), what="a busy worker"
            )
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                if self.computing(pid) >= 2:  # it writes no more, so that was true when it was hit
                    return int(pid)


@contextmanager
def served(place: Path, *words: str | Path, key: str | None = None, ready: bool = True) -> Iterator[Service]:
    """`mdeploy serve app WORDS` in the foreground, until it answers /health; nothing of it is left afterwards."""
    port = free_port()
    (place / "lab").mkdir(parents=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MDEPLOY_")}
    env = {**kept, "MDEPLOY_HOME": str(place / "home"), **({"MDEPLOY_API_KEY": key} if key else {})}
    told = ["--name", "lab", "--port", str(port), "--gpus", "none", "--env", f"LAB={place / 'lab'}"]
    with (place / "out").open("w") as out:
        command = [sys.executable, "-m", "mdeploy", "serve", "app", *map(str, words), *told]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, text=True)
    service = Service(place, port, process, key)
    with process:
        try:
            if ready:
                until(lambda: _is_up(service) or process.poll() is not None, START_S, "the service answers")
                assert process.poll() is None, service.log
            yield service
        finally:
            _end(service)


def _is_up(service: Service) -> bool:
    with suppress(httpx.TransportError):
        return listens(service.port) and service.ask("/health", method="GET").status_code == 200
    return False


def _end(service: Service) -> None:
    service.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        service.process.wait(30)
    left = processes_with(f"MDEPLOY_HOME={service.home}")
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"processes outlived the service\n{service.log[-3000:]}"


@dataclass
class Tally:
    """What clients that ask for their own numbers got back."""

    right: int = 0
    wrong: list[Any] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@contextmanager
def echoing(service: Service, path: str = "/echo", clients: int = 8, sleep: float = 0.05) -> Iterator[Tally]:
    """Clients that ask without a pause while the block runs; each answer is compared with its question."""
    tally, over, lock = Tally(), threading.Event(), threading.Lock()
    numbers = iter(range(1, 1 << 62))

    def count(change: Callable[[], None]) -> None:
        with lock:
            change()

    def one() -> None:
        url = f"http://127.0.0.1:{service.port}{path}"
        with httpx.Client(headers=service.headers, timeout=30, trust_env=False) as client:
            while not over.is_set():
                with lock:
                    item = {"n": next(numbers), "sleep": sleep}
                _echo_once(client, url, item, tally, count)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: tally.right, what="a first right answer")
        yield tally
    finally:
        over.set()
        for thread in threads:
            thread.join(40)


def _echo_once(
    client: httpx.Client, url: str, item: Any, tally: Tally, count: Callable[[Callable[[], None]], None]
) -> None:
    try:
        answer = client.post(url, json=item)
    except httpx.TransportError as error:
        text = repr(error)
        count(lambda: tally.failed.append(text))
        time.sleep(0.05)
        return
    if answer.status_code != 200:
        count(lambda: tally.failed.append(f"{answer.status_code} {answer.text}"))
    elif answer.json() != item:
        count(lambda: tally.wrong.append((item, answer.json())))
    else:
        tally.right += 1
