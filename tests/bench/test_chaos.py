"""The scripts that hurt a service: they run, and what they would call a lie or a leak is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPO, until

pytestmark = pytest.mark.alone

# Without those where somebody has to find out that a process hangs: that takes half a minute each.
QUICK = (
    "kill-supervisor",
    "kill-guard",
    "kill-server",
    "kill-core",
    "kill-two",
    "kill-heir",
    "kill-everything",
    "kill-while-starting",
    "log-truncated",
    "log-removed",
    "state-torn",
    "two-stops",
    "stop-and-restart",
)


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO / "scripts/bench")


def _run(name: str, *args: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(REPO / "scripts/bench" / name), *args], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_few_rounds_of_chaos() -> None:
    result = _run("chaos", "--rounds", "13", "--real-rounds", "0", "--seed", "3", "--faults", *QUICK)
    assert (result["rounds"], result["real_rounds"], result["seed"], result["violations"]) == (13, 0, 3, [])
    assert set(result["by_fault"]) == set(QUICK)
    for row in result["by_fault"].values():
        assert (row["right"], row["recovered"], row["leaks"]) == (row["rounds"], row["rounds"], 0)
        assert row["median_s_to_ready"] > 0


def test_recovery_is_compared_with_a_bare_start() -> None:
    result = _run("recovery", "--stand-in", "--runs", "1")
    assert all(result[f"{name}_s"] > 0 for name in ("bare", "crash", "restart"))
    assert all(result[f"{name}_ratio"] > 0 for name in ("crash", "restart"))


def test_what_counts_as_a_lie() -> None:
    from chaos import _wrong
    from chaos_scan import Process, Scene
    from chaos_service import Look

    supervisor = Process(10, 1, "S", ("python", "-m", "mdeploy", "run", "s"))
    server, stopped = Process(12, 10, "S", ("python",), "r"), Process(12, 10, "T", ("python",), "r")
    up, nobody = Scene((supervisor,), (), (server,), ()), Scene((), (), (), ())
    frozen, orphans = Scene((supervisor,), (), (stopped,), ()), Scene((), (), (server,), ())

    def wrong(phase: str, pid: int | None, scene: Scene, *, answers: bool) -> str:
        return str(_wrong({"phase": phase, "pid": pid}, Look(scene, answers)))

    assert wrong("ready", 10, up, answers=True) == ""
    assert wrong("unhealthy", 10, frozen, answers=True) == ""
    assert wrong("stopped", None, nobody, answers=False) == ""
    assert wrong("failed", None, orphans, answers=False) == ""
    assert "no request is answered" in wrong("ready", 10, up, answers=False)
    assert "requests are answered" in wrong("starting", 10, up, answers=True)
    assert "requests are answered" in wrong("unhealthy", 10, up, answers=True)
    assert "is no supervisor" in wrong("ready", 11, up, answers=True)
    assert "shows no pid" in wrong("starting", None, up, answers=False)
    assert "nobody supervises" in wrong("starting", None, nobody, answers=False)
    assert "it says stopped" in wrong("stopped", None, orphans, answers=False)


def test_what_counts_as_a_leak(tmp_path: Path) -> None:
    from chaos_service import Service

    service = Service(tmp_path, 1, tmp_path, (), 1.0, 1.0)
    for directory in (service.home, service.temporary):
        directory.mkdir()
    assert service.leaks() == []
    (service.temporary / "mdeploy-run-old").mkdir()
    segment = Path(f"/dev/shm/chaos-test-{os.getpid()}")
    code = f"import mmap, sys; f = open({str(segment)!r}, 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)"
    code += "; print('mapped', flush=True); sys.stdin.read()"
    env = {**os.environ, "MDEPLOY_HOME": str(service.home), "MDEPLOY_RUN_ID": "old"}
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as old:
            assert old.stdout is not None
            assert old.stdout.readline() == "mapped\n"
            assert not service.look().answers
            found = service.leaks()
            assert any(leak.startswith(f"old process {old.pid}(") for leak in found)
            assert str(service.temporary / "mdeploy-run-old") in found
            assert str(segment) not in found
            old.communicate()
        until(lambda: str(segment) in service.leaks(), what="a segment that nobody has mapped any more")
    finally:
        segment.unlink()
