"""A cluster of two machines, with a real Ray: what a user does, and what befalls machines."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.machines import SMALL, Load, Machine, two
from tests.support import REPO, until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

APP = """
import os, time
from helper import loud
from mdeploy.serving.handler import Handler

class Echo(Handler):
    max_batch_size = 4
    example = {"text": "hello"}

    def init(self, device):
        print("loading on", device, "with", os.environ.get("COLOUR"), flush=True)

    def forward(self, batch):
        time.sleep(0.01)
        return [{"text": one["text"], "loud": loud(one["text"]), "pid": os.getpid()} for one in batch]
"""

COUNT = """
import time
from mdeploy.serving.handler import Handler

class Count(Handler):
    timeout = 2

    def inference(self, request):
        time.sleep(request.json().get("sleep", 0))
        for number in range(request.json()["upto"]):
            yield {"number": number}
"""

PORT, SECOND_PORT = 8123, 8124


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """A head and a machine that has joined it."""
    with two(tmp_path_factory.mktemp("c")) as (head, other):
        started = head.mdeploy(*readme("start"), "--address", head.ip, *SMALL)
        assert started.code == 0, started.stderr
        assert started.stdout.strip() == f"{head.ip}:6379"
        join(head, other)
        yield head, other


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that only the head is told of."""
    directory = tmp_path_factory.mktemp("source")
    (directory / "app.py").write_text(APP)
    (directory / "helper.py").write_text("def loud(text):\n    return text.upper()\n")
    return directory


@pytest.fixture(scope="module")
def service(machines: tuple[Machine, Machine], source: Path) -> Machine:
    """The app, served on all machines there are; returns the machine its URL is on."""
    head, _ = machines
    words = ("--name", "echoes", "--port", str(PORT), "--cpus-per-replica", "0.25", "--env", "COLOUR=green")
    typed = [str(source / "app.py") if word.endswith(".py") else word for word in readme("serve")]
    served = head.mdeploy(*typed, *words)
    assert served.code == 0, served.stderr
    replicas_on(head, 2)
    return head


def readme(verb: str) -> list[str]:
    """The words README gives for a verb, below its heading."""
    below = (REPO / "README.md").read_text().split("### Many machines\n")[1]
    line = next(line for line in below.splitlines() if line.startswith("$ mdeploy ") and verb in line.split())
    return line.split()[2:]


def join(head: Machine, other: Machine) -> None:
    token = (head.home / "secrets/cluster.token").read_text().strip()
    words = [word.replace("10.0.0.1", head.ip) for word in readme("join")]
    joined = other.mdeploy(*words, *SMALL, "--json", MDEPLOY_CLUSTER_TOKEN=token)
    assert joined.code == 0, joined.stderr
    assert joined.json["cluster"]["address"] == f"{head.ip}:6379"


_GET = """
import json, sys, urllib.error, urllib.request
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}{sys.argv[2]}", sys.argv[3].encode() or None)
try:
    reply = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    reply = error
print(json.dumps(reply.read().decode()))
"""


def ask(machine: Machine, path: str, body: str = "", port: int = PORT) -> str:
    return str(machine.python(_GET, str(port), path, body))


def workers(machine: Machine, handler: str = "echo", port: int = PORT) -> list[dict[str, Any]]:
    found = json.loads(ask(machine, "/health", port=port))["handlers"][handler]["workers"]
    return [worker for worker in found if worker["state"] in ("ready", "busy")]


def replicas_on(machine: Machine, nodes: int) -> list[dict[str, Any]]:
    """Wait until so many machines have a replica."""

    def spread() -> list[dict[str, Any]] | None:
        found = workers(machine)
        return found if len({worker["device"] for worker in found}) == nodes else None

    return list(until(spread, 90, f"replicas on {nodes} machines"))


def test_the_service_is_like_any_other_on_all_machines(machines: tuple[Machine, Machine], service: Machine) -> None:
    head, other = machines
    assert {worker["device"] for worker in workers(head)} == {f"{head.ip}/cpu", f"{other.ip}/cpu"}
    assert '"loud":"ABC"' in ask(head, "/echo", '{"text": "abc"}')
    assert '"ready"' in ask(head, "/ready")
    until(lambda: head.log("echoes").count("loading on cpu with green") >= 2, 30, "what both replicas print")
    shown = head.mdeploy(*readme("status"), "--json").json["cluster"]
    assert [node["ip"] for node in shown["nodes"] if node["is_alive"]] == [head.ip, other.ip]
    assert {(r["service"], r["handler"], r["node"]) for r in shown["replicas"]} == {
        ("echoes", "echo", ip) for ip in (head.ip, other.ip)
    }
    found = head.service("echoes")
    assert found is not None and found["kind"] == "app"


def test_the_token_stands_nowhere(machines: tuple[Machine, Machine], service: Machine) -> None:
    token = (machines[0].home / "secrets/cluster.token").read_text().strip()
    assert (machines[0].home / "secrets/cluster.token").stat().st_mode & 0o777 == 0o600
    for machine in machines:
        words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in machine.pids()]
        assert not any(token.encode() in line for line in words)
        for file in (machine.home / "services").rglob("*"):
            assert not file.is_file() or token.encode() not in file.read_bytes(), file


def test_no_request_fails_when_a_machine_dies_and_it_is_used_again_once_it_is_back(
    machines: tuple[Machine, Machine], service: Machine, tmp_path: Path
) -> None:
    head, other = machines
    with Load(head, PORT, tmp_path / "stop") as load:
        other.kill_everything()
        load.answered(400)
        result = load.result()
    assert result["wrong"] == []
    replicas_on(head, 1)
    join(head, other)
    replicas_on(head, 2)


def test_no_request_fails_when_a_cable_is_cut(
    machines: tuple[Machine, Machine], service: Machine, tmp_path: Path
) -> None:
    head, other = machines
    with Load(head, PORT, tmp_path / "stop") as load:
        other.cable("down")
        until(lambda: len(workers(head)) == 1, 60, "the machine is given up")
        load.answered(100)
        result = load.result()
    other.cable("up")
    assert result["wrong"] == []
    replicas_on(head, 2)  # nobody has to join it again


def test_a_killed_edge_finds_its_replicas_again(machines: tuple[Machine, Machine], service: Machine) -> None:
    head, _ = machines
    before = {worker["pid"] for worker in replicas_on(head, 2)}
    edge = next(pid for pid in head.pids() if b"mdeploy.apps\0app" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(edge, 9)
    until(lambda: (found := head.service("echoes")) and found["restarts"] == 1 and found["phase"] == "ready", 90)
    assert {worker["pid"] for worker in replicas_on(head, 2)} == before


def test_a_rolling_restart_renews_every_replica(
    machines: tuple[Machine, Machine], service: Machine, tmp_path: Path
) -> None:
    head, _ = machines
    before = {worker["pid"] for worker in workers(head)}
    with Load(head, PORT, tmp_path / "stop") as load:
        restarted = head.mdeploy("restart", "echoes")
        result = load.result()
    assert restarted.code == 0, restarted.stderr
    assert result["wrong"] == []
    assert before.isdisjoint(worker["pid"] for worker in replicas_on(head, 2))


def test_a_second_service_streams_gets_over_a_hang_and_goes_alone(
    machines: tuple[Machine, Machine], service: Machine, tmp_path: Path
) -> None:
    head, _ = machines
    (tmp_path / "count.py").write_text(COUNT)
    words = ("--port", str(SECOND_PORT), "--replicas", "1", "--cpus-per-replica", "0.25", "-d")
    served = head.mdeploy("serve", "app", tmp_path / "count.py", "--cluster", *words)
    assert served.code == 0, served.stderr
    assert ask(head, "/count", '{"upto": 3}', SECOND_PORT).count("data: ") == 3
    (hung,) = workers(head, "count", SECOND_PORT)
    assert "no answer within 2 s" in ask(head, "/count", '{"sleep": 600, "upto": 1}', SECOND_PORT)
    until(lambda: [w["pid"] for w in workers(head, "count", SECOND_PORT)] not in ([], [hung["pid"]]), 60, "another one")
    assert ask(head, "/count", '{"upto": 2}', SECOND_PORT).count("data: ") == 2
    assert head.mdeploy("stop", "count").code == 0
    assert '"loud":"ABC"' in ask(head, "/echo", '{"text": "abc"}')


def test_a_class_that_cannot_start_is_told_and_the_others_go_on(
    machines: tuple[Machine, Machine], service: Machine, tmp_path: Path
) -> None:
    head, _ = machines
    (tmp_path / "bad.py").write_text(
        "from mdeploy.serving.handler import Handler\n"
        "class Bad(Handler):\n"
        "    def init(self, device):\n"
        "        raise RuntimeError('no weights here')\n"
        "    def inference(self, request):\n"
        "        return 1\n"
    )
    served = head.mdeploy("serve", "app", tmp_path / "bad.py", "--cluster", "--cpus-per-replica", "0.25", "-d")
    assert served.code == 1
    assert f"RuntimeError: no weights here ({tmp_path}/bad.py, line 4)" in served.stderr
    assert '"loud":"ABC"' in ask(head, "/echo", '{"text": "abc"}')


def test_joining_tells_what_is_wrong(machines: tuple[Machine, Machine]) -> None:
    head, other = machines
    words = ("cluster", "join")
    there = other.mdeploy(*words, head.ip, MDEPLOY_CLUSTER_TOKEN="x" * 32)
    assert (there.code, "this machine is in the cluster" in there.stderr) == (1, True)
    outside = Machine(other.namespace, other.ip, other.home.parent / "outside")
    for args, env, code, text in (
        ((head.ip,), {"MDEPLOY_CLUSTER_TOKEN": "x" * 32}, 78, "has another token"),
        ((head.ip,), {"MDEPLOY_CLUSTER_TOKEN": "short"}, 78, "that is no token"),
        ((head.ip,), {}, 78, "joining needs the token"),
        ((f"{head.ip}:6380",), {"MDEPLOY_CLUSTER_TOKEN": "x" * 32}, 69, f"no cluster answers at {head.ip}:6380"),
        ((f"{head.ip}:port",), {}, 2, "is no address of a head"),
        ((head.ip, "x" * 32), {}, 2, "can be seen by everybody"),
    ):
        refused = outside.mdeploy(*words, *args, **env)
        assert refused.code == code and text in refused.stderr, refused
    assert not (outside.home / "services").exists()


def test_stopping_leaves_nothing(machines: tuple[Machine, Machine], service: Machine) -> None:
    head, other = machines
    assert head.mdeploy("stop", "echoes").code == 0
    until(lambda: head.mdeploy("cluster", "status", "--json").json["cluster"]["replicas"] == [], 30, "no replicas")
    assert other.mdeploy(*readme("stop")).code == 0
    assert head.mdeploy("cluster", "stop").code == 0
    for machine in machines:
        until(functools.partial(_is_quiet, machine), 20, "no process is left")


def _is_quiet(machine: Machine) -> bool:
    return not machine.pids()
