"""Two machines for a test: network namespaces with a cable between them, servers, a real nginx, load from threads."""

from __future__ import annotations

import ctypes
import hashlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mdeploy.serving.options import AppOptions
from tests.support import REPO, until

NGINX = "/usr/sbin/nginx"
_CLONE_NEWNET = 0x40000000
_NUMBERS = itertools.count()

_MAIN = """daemon off;
pid {0}/nginx.pid;
error_log {0}/error.log info;
user root;
worker_processes 2;
events {{}}
http {{
    access_log off;
    client_body_temp_path {0}/body;
    proxy_temp_path {0}/proxy;
    fastcgi_temp_path {0}/fastcgi;
    uwsgi_temp_path {0}/uwsgi;
    scgi_temp_path {0}/scgi;
    include {1};
}}
"""


@dataclass(frozen=True)
class Machine:
    """A network namespace; None is the one the tests run in."""

    namespace: str | None = None

    def command(self, *words: str | Path) -> list[str]:
        """What runs a command there."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, *map(str, words)]

    def run(self, *words: str | Path) -> None:
        """Run a command there that must succeed."""
        subprocess.run(self.command(*words), check=True, capture_output=True)

    def enter(self) -> None:
        """Make this thread's new sockets belong there."""
        if self.namespace:
            with Path(f"/run/netns/{self.namespace}").open() as file:
                assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) == 0

    def __call__(self, action: Callable[[], object]) -> object:
        """Do something with sockets of that machine."""
        with ThreadPoolExecutor(1, initializer=self.enter) as pool:
            return pool.submit(action).result()


HERE = Machine()


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """10.77.0.1 and 10.77.0.2, each with a loopback of its own; gone at the end."""
    mark = f"md{os.getpid() % 100000}x{next(_NUMBERS)}"
    near, far = Machine(f"{mark}a"), Machine(f"{mark}b")
    with ExitStack() as stack:
        for machine in (near, far):
            subprocess.run(["ip", "netns", "add", str(machine.namespace)], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", str(machine.namespace)], check=True)
        near.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(far.namespace))
        for number, machine in enumerate((near, far), 1):
            machine.run("ip", "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            machine.run("ip", "link", "set", "cable", "up")
            machine.run("ip", "link", "set", "lo", "up")
        yield near, far


@contextmanager
def process(machine: Machine, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program there that says something once it is ready; killed at the end."""
    with subprocess.Popen(machine.command(*words), stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline()
            yield running
        finally:
            running.kill()


@contextmanager
def echo(machine: Machine, host: str, port: int, name: str) -> Iterator[subprocess.Popen[str]]:
    """A server whose answers say `name`."""
    script = REPO / "tests/fakes/echo_server.py"
    with process(machine, sys.executable, script, host, str(port), name) as running:
        yield running


@contextmanager
def app(machine: Machine, host: str, port: int, name: str) -> Iterator[subprocess.Popen[str]]:
    """One of our own apps with the same answers; its workers end with it."""
    options = AppOptions(name, host, port, (f"{REPO}/tests/fakes/echo_handler.py:Echo",), workers_per_device=2)
    words = machine.command("env", f"ECHO_NAME={name}", sys.executable, "-m", "mdeploy.apps", "app", *options.argv())
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as running:
        try:
            machine(lambda: until(lambda: _answers(port), what=f"{name} answers"))
            yield running
        finally:
            running.kill()


def _answers(port: int) -> bool:
    try:
        return ask(port).status == 200
    except OSError:
        return False


@contextmanager
def nginx(machine: Machine, directory: Path, site: Path) -> Iterator[Path]:
    """A real nginx with this site; yields its error log."""
    directory.mkdir(exist_ok=True)
    (directory / "nginx.conf").write_text(_MAIN.format(directory, site))
    log = directory / "error.log"
    words = machine.command(NGINX, "-p", directory, "-c", directory / "nginx.conf")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as running:
        try:
            until(lambda: running.poll() is not None or _is_up(log), what="nginx starts")
            assert running.poll() is None, (running.stderr and running.stderr.read()) or log.read_text()
            yield log
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(20)


def _is_up(log: Path) -> bool:
    return log.exists() and "start worker process" in log.read_text()


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        return dict(json.loads(self.body))


def ask(port: int, method: str = "GET", path: str = "/v1/x", body: bytes = b"", /, **headers: str) -> Answer:
    """One request over a connection of its own; names of headers with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


@dataclass
class Load:
    """Clients that never stop asking; every answer is checked against what was sent."""

    machine: Machine
    port: int
    clients: int = 8
    streams: bool = True
    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def more(self, name: str, count: int = 20) -> None:
        """Wait until a server has answered so many more times."""
        goal = self.answers[name] + count
        until(lambda: self.answers[name] >= goal or self.failures, 60, f"{name} answers")

    def _client(self, number: int) -> None:
        self.machine.enter()
        stream = [("POST", "/v1/stream", 100)] if self.streams else []
        kinds = itertools.cycle([("GET", "/v1/x", 0), ("POST", "/v1/x", 100 << 10), *stream])
        for _ in range(number % 3):
            next(kinds)
        while not self._stopping.is_set():
            method, path, size = next(kinds)
            body = os.urandom(size)
            try:
                answer = ask(self.port, method, f"{path}?delay=0.03", body)
                events = answer.body.decode().replace("data: ", "").split("\n\n") if "stream" in path else []
                documents = [json.loads(event) for event in events if event] or [answer.json]
                right = {one["sha256"] for one in documents} == {hashlib.sha256(body).hexdigest()}
                assert answer.status == 200 and right and len(documents) == (3 if "stream" in path else 1)
                self.answers[documents[0]["server"]] += 1
            except Exception as error:
                self.failures.append(f"{method} {path}: {error!r}")
