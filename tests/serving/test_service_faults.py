"""Workers that die, hang and stop under load, as clients see it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.serving.served import LAB, Service, echoing, served
from tests.support import mdeploy, until


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("faults")
    with served(place, f"{LAB}:Echo", f"{LAB}:Events", "--workers-per-gpu", "2") as service:
        yield service


@pytest.fixture
def lab(running: Service) -> Service:
    """The service with both workers well, whatever the test before did to it."""
    until(lambda: len(running.workers("echo")) == 2, 20, "two workers")
    return running


def _replaced(lab: Service, pid: int) -> bool:
    pids = lab.pids("echo")
    return pid not in pids and len(pids) == 2


def test_a_killed_worker_costs_no_request(lab: Service) -> None:
    with echoing(lab, clients=12) as tally:
        for _ in range(3):
            pid = lab.signal_computing("echo", signal.SIGKILL)
            until(partial(_replaced, lab, pid), what="another worker")
    assert tally.right > 0
    assert (tally.failed, tally.wrong) == ([], [])


def test_an_item_that_kills_a_second_worker_is_answered_500(lab: Service) -> None:
    before = lab.noted("deaths")
    items = [{"n": "poison", "do": "die", "sleep": 0}, *({"n": i, "sleep": 0.1} for i in range(6))]
    poison, *others = lab.ask_all("/echo", items)
    assert poison.status_code == 500
    assert "worker" in poison.json()["error"]["message"]
    assert [answer.json()["n"] for answer in others] == list(range(6))
    dead = set(lab.noted("deaths")[len(before) :])
    assert len(dead) == 2
    until(
        lambda: len(lab.pids("echo")) == 2 and not {str(pid) for pid in lab.pids("echo")} & dead, what="other workers"
    )
    assert len(lab.noted("deaths")) == len(before) + 2
    assert lab.ask("/echo", {"n": 1}).json() == {"n": 1}


def test_a_hung_worker_is_answered_504_and_replaced(lab: Service) -> None:
    before = lab.pids("echo")
    answer = lab.ask("/echo", {"n": "h", "do": "hang"})
    assert answer.status_code == 504
    assert answer.json()["error"]["message"]
    until(lambda: len(lab.pids("echo") - before) == 1 and len(lab.pids("echo")) == 2, what="one other worker")
    assert lab.ask("/echo", {"n": 1}).status_code == 200


def test_a_stopped_worker_is_replaced_while_the_other_goes_on(lab: Service) -> None:
    with echoing(lab, clients=8) as tally:
        pid = lab.signal_computing("echo", signal.SIGSTOP)
        until(lambda: _replaced(lab, pid), what="another worker")
        right = tally.right
        until(lambda: tally.right > right, what="right answers afterwards")
    assert tally.wrong == []
    assert {failure[:3] for failure in tally.failed} <= {"504"}
    assert not Path(f"/proc/{pid}").exists()


def test_a_rolling_restart_costs_no_request(lab: Service) -> None:
    before = lab.pids("echo")
    with echoing(lab, clients=8) as tally:
        done = mdeploy("restart", "lab", MDEPLOY_HOME=str(lab.home))
        assert done.code == 0, done.stderr
        assert not lab.pids("echo") & before
    assert (tally.failed, tally.wrong) == ([], [])
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), what="the old workers are gone")


def test_a_stream_whose_worker_dies_ends_with_an_error(lab: Service) -> None:
    with lab.connect("/events", {"sleep": 0.05}) as sock:
        assert sock.recv(100)
        pid = until(lambda: next((w["pid"] for w in lab.workers("events") if w["state"] == "busy"), None))
        os.kill(pid, signal.SIGKILL)
        text = b""
        while b"event: error" not in text and (part := sock.recv(65536)):
            text += part
    assert b"event: error" in text
    until(lambda: len(lab.workers("events")) == 2, what="another worker")


def test_a_stream_outlives_a_rolling_restart(lab: Service) -> None:
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(lab.ask, "/events", {"count": 30, "sleep": 0.1})
        until(lambda: any(w["state"] == "busy" for w in lab.workers("events")), what="the stream runs")
        assert mdeploy("restart", "lab", MDEPLOY_HOME=str(lab.home)).code == 0
        answer = stream.result()
    assert answer.text.count("data:") == 30
    assert "error" not in answer.text


def test_a_bad_item_fails_alone_in_a_full_batch(lab: Service) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: lab.ask("/echo", {"n": n, "sleep": 0.2}), range(2)))  # both workers busy at first
    items = [{"n": i, "do": "raise" if i == 2 else None, "sleep": 0.05} for i in range(8)]
    answers = lab.ask_all("/echo", items)
    assert [a.status_code for a in answers] == [500 if i == 2 else 200 for i in range(8)]
    assert "this item is broken" not in answers[2].text
    assert "this item is broken" in lab.log


def test_health_and_metrics_tell_of_the_workers(lab: Service) -> None:
    health = lab.health()
    assert health["status"]
    assert {"pid", "device", "generation", "state"} <= set(health["handlers"]["echo"]["workers"][0])
    text = lab.ask("/metrics", method="GET").text
    restarts = [
        line for line in text.splitlines() if "restart" in line and "crash" in line and not line.startswith("#")
    ]
    assert restarts and float(restarts[0].split()[-1]) >= 1


def test_a_worker_dies_with_its_service_even_when_that_is_killed(tmp_path: Path) -> None:
    with served(tmp_path / "s", f"{LAB}:Echo", "--restart", "never") as lab:
        workers = lab.pids("echo")
        stat = Path(f"/proc/{next(iter(workers))}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), what="no worker is left")
        assert lab.process.wait(30) != 0


def test_access_log_has_one_json_line_a_request(lab: Service) -> None:
    lab.ask("/echo", {"n": "logged"}, headers={"X-Request-Id": "look-for-me"})
    line = until(lambda: next((t for t in lab.log.splitlines() if "look-for-me" in t), None), what="the line")
    row = json.loads(line[line.index("{") :])
    assert (row["method"], row["path"], row["status"]) == ("POST", "/echo", 200)
