"""Start scripts of modelserve, as they were: a controller, its workers, and what happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import free_port, processes_with, until

SCRIPT = """
import os
from mdeploy.compat.modelserve import JsonResponse, api, runserver_with_args


@api(name="custom")
class Model:
    def init(self, device):
        self.device = device

    def inference(self, request):
        if request.FILES:
            return JsonResponse({"name": request.FILES["image"].name, "bytes": request.FILES["image"].size,
                                 "text": request.POST["text"]})
        if request.method == "POST":
            return JsonResponse({"body": request.body.decode(), "header": request.headers["X-Mine"]})
        return JsonResponse({"text": request.GET["text"], "device": self.device, "pid": os.getpid()})


if __name__ == "__main__":
    runserver_with_args()
"""


class Machine:
    """The directory of a script, and the processes that were started from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "example.py").write_text(SCRIPT)
        (directory / "index.html").write_text("<h1>captions</h1>")
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        self.started: list[subprocess.Popen[bytes]] = []
        self.addresses: list[str] = []
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"log{len(self.started)}").open("wb") as log:
            command = [sys.executable, "example.py", *words]
            self.started.append(subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log))
        return self.started[-1]

    def controller(self, *words: str) -> subprocess.Popen[bytes]:
        return self.start("--controller", "--port", str(self.port), *words)

    def worker(self, device: str = "cpu", port: int = 0) -> subprocess.Popen[bytes]:
        port = port or free_port()
        self.addresses.append(f"http://localhost:{port}")
        addresses = ("--controller-addr", self.url, "--worker-addr", self.addresses[-1])
        return self.start("--worker", "--port", str(port), "--name", "custom", "--device", device, *addresses)

    def workers(self) -> list[dict[str, Any]]:
        try:
            document = self.http.get("/health").json()
        except httpx.TransportError:
            return []
        return [w for w in document["handlers"]["custom"]["workers"] if w["state"] in ("ready", "busy")]

    def log(self, index: int) -> str:
        return (self.directory / f"log{index}").read_text()

    def end(self) -> None:
        self.http.close()
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            process.wait(30)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    try:
        yield found
    finally:
        found.end()


def test_a_controller_and_its_workers(machine: Machine, tmp_path: Path) -> None:
    controller = machine.controller()
    workers = [machine.worker("0"), machine.worker("cuda:1")]
    until(lambda: len(machine.workers()) == 2, what="both workers have joined")
    http = machine.http
    assert http.get("/").text == "<h1>captions</h1>"
    answers = [http.get("/custom?text=a%20b").json() for _ in range(4)]
    assert {answer["text"] for answer in answers} == {"a b"}
    assert {answer["device"] for answer in answers} == {"0", "cuda:1"}  # word for word, and both are asked
    assert http.post("/custom", content=b'{"x": 1}', headers={"X-Mine": "h"}).json() == {
        "body": '{"x": 1}',
        "header": "h",
    }
    files = {"image": ("ü.jpg", b"\xff" * 1000)}
    assert http.post("/custom", files=files, data={"text": "t"}).json() == {"name": "ü.jpg", "bytes": 1000, "text": "t"}
    missing = http.get("/custom")
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "missing_field")
    joining = {"address": "http://127.0.0.1:1", "name": "custom", "state": "ready"}
    assert http.post("/workers", json=joining).status_code == 401
    direct = httpx.get(f"{machine.addresses[0]}/custom?text=x", trust_env=False)
    assert direct.status_code == 401
    _killed_under_load(machine, workers[0])
    machine.worker("0")
    until(lambda: len(machine.workers()) == 2, what="the replacement has joined")
    workers[1].terminate()
    assert workers[1].wait(30) == 0
    assert len(machine.workers()) == 1  # it said so itself
    assert http.get("/custom?text=x").status_code == 200
    controller.terminate()
    assert controller.wait(30) == 0
    machine.end()
    assert "Traceback" not in "".join(machine.log(index) for index in range(4))
    until(lambda: processes_with(f"MDEPLOY_HOME={tmp_path / 'home'}") == [], what="nothing is left")


def test_a_name_with_a_slash(machine: Machine) -> None:
    script = machine.directory / "example.py"
    script.write_text(script.read_text().replace('name="custom"', 'name="v1/custom"'))
    machine.controller()
    port = free_port()
    machine.start("--worker", "--port", str(port), "--device", "cpu", "--controller-addr", machine.url)

    def answer() -> httpx.Response:
        try:
            return machine.http.get("/v1/custom?text=x")
        except httpx.TransportError:
            return httpx.Response(503)

    until(lambda: answer().status_code == 200, what="the worker has joined")


def _killed_under_load(machine: Machine, worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker's process and its app while four clients ask: nobody notices."""
    answers: list[tuple[int, str, str]] = []
    over = threading.Event()

    def client(name: str) -> None:
        with httpx.Client(base_url=machine.url, timeout=30, trust_env=False) as http:
            count = 0
            while not over.is_set():
                count += 1
                text = f"{name}-{count}"
                reply = http.get("/custom", params={"text": text})
                answers.append((reply.status_code, text, reply.json().get("text", reply.text)))

    clients = [threading.Thread(target=client, args=(str(n),)) for n in range(4)]
    for each in clients:
        each.start()
    until(lambda: len(answers) > 50, what="clients are answered")
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    for pid in (*map(int, children), worker.pid):
        os.kill(pid, signal.SIGKILL)
    worker.wait(10)
    enough = len(answers) + 100
    until(lambda: len(answers) > enough and len(machine.workers()) == 1, what="the dead worker is out")
    over.set()
    for each in clients:
        each.join()
    assert [answer for answer in answers if answer[0] != 200 or answer[1] != answer[2]] == []


def test_a_worker_with_another_token_is_sent_away(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.controller()
    until(lambda: "listens" in machine.log(0), what="the controller listens")
    (file := tmp_path / "other").write_text("x" * 40)
    file.chmod(0o600)
    monkeypatch.setenv("MDEPLOY_MODELSERVE_TOKEN_FILE", str(file))
    worker = machine.worker()
    assert worker.wait(60) == 78
    assert "does not take this worker: this needs the controller's token" in machine.log(1)
    assert "MDEPLOY_MODELSERVE_TOKEN_FILE" in machine.log(1)


def test_a_class_that_cannot_start_ends_its_worker(machine: Machine) -> None:
    (machine.directory / "example.py").write_text(SCRIPT.replace("self.device = device", "raise OSError('no weights')"))
    worker = machine.worker()
    assert worker.wait(60) == 1
    assert "mdeploy-app: error: OSError: no weights" in machine.log(0)


def test_nobody_listens_to_the_world_without_a_key(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = machine.controller("--host", "0.0.0.0")
    assert refused.wait(30) == 78
    assert "without a key" in machine.log(0)
    (file := tmp_path / "keys").write_text("sk-one\n")
    monkeypatch.setenv("MDEPLOY_API_KEYS_FILE", str(file))
    machine.controller("--host", "0.0.0.0")
    until(lambda: "listens" in machine.log(1), what="the controller listens")
    assert until(lambda: _status(machine), what="it answers") == 401
    assert machine.http.get("/custom", headers={"Authorization": "Bearer sk-one"}).status_code == 503
    assert machine.http.get("/").text == "<h1>captions</h1>"


def _status(machine: Machine) -> int:
    try:
        return machine.http.get("/custom").status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--port", "1"), "one of the arguments --controller --worker is required"),
        (("--controller", "--port", "99999"), "no port"),
        (("--worker", "--port", "1", "--name", "x"), "is no model of example.py"),
        (("--worker", "--port", "1"), "needs --device and --controller-addr"),
        (("--worker", "--port", "1", "--device", "0", "--controller-addr", "localhost"), "no address like"),
    ],
)
def test_mistakes_on_the_command_line(machine: Machine, words: tuple[str, ...], says: str) -> None:
    assert machine.start(*words).wait(30) == 2
    assert says in machine.log(0)
    assert "Traceback" not in machine.log(0)


def test_a_port_that_is_taken(machine: Machine) -> None:
    machine.controller()
    until(lambda: "listens" in machine.log(0), what="the controller listens")
    assert machine.controller().wait(30) == 78
    assert f"cannot listen on 127.0.0.1:{machine.port}" in machine.log(1)
