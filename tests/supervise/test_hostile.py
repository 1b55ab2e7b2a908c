"""What went wrong once: races, foreign files, full disks, closed terminals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from mdeploy.paths import Paths
from mdeploy.supervise import processes
from mdeploy.supervise.state import ServiceFiles
from tests.support import free_port, mdeploy, processes_with, ps, running, tiny_model, until

pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "org" / "tiny")


def _state(home: Path, name: str = "s") -> dict[str, Any]:
    return dict(json.loads((home / "services" / name / "state.json").read_text()))


def test_of_two_serves_of_one_name_one_wins_with_its_own_spec(model: Path) -> None:
    ports = {free_port() for _ in range(2)}
    with (
        running("serve", "llm", model, "--name", "s", "-d", "--port", str(ports.pop())) as first,
        running("serve", "llm", model, "--name", "s", "-d", "--port", str(ports.pop())) as second,
    ):
        outcomes = {p.communicate(timeout=60)[0].strip(): p.returncode for p in (first, second)}
    assert sorted(outcomes.values()) == [0, 1]
    service = ps("s") or {}
    assert service["phase"] == "ready"
    assert outcomes[service["url"]] == 0


def test_two_restarts_at_once_leave_it_running(model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "s", "-d").code == 0
    with running("restart", "s") as first, running("restart", "s") as second:
        assert (first.wait(60), second.wait(60)) == (0, 0)
    assert (ps("s") or {})["phase"] == "ready"


def test_two_serves_without_a_port_get_one_each(model: Path) -> None:
    with (
        running("serve", "llm", model, "--name", "a", "-d") as first,
        running("serve", "llm", model, "--name", "b", "-d") as second,
    ):
        assert (first.wait(60), second.wait(60)) == (0, 0)
    assert (ps("a") or {})["port"] != (ps("b") or {})["port"]


def test_a_look_does_not_take_the_lock_from_a_starting_supervisor(tmp_path: Path) -> None:
    files = ServiceFiles(Paths(tmp_path / "h"), "x")
    files.create()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            files.is_supervised()

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(200):
            with files.locked():
                pass
    finally:
        over.set()
        watcher.join()


def test_another_server_on_the_port_is_not_our_engine(home: Path, model: Path) -> None:
    """The port is taken between our check and the engine's bind: here by a service of another home."""
    other = home.parent / "other"
    shutil.copytree(home / "engines", other / "engines")
    port = free_port()
    served = mdeploy("serve", "llm", model, "--name", "o", "-d", "--port", str(port), MDEPLOY_HOME=str(other))
    assert served.code == 0
    try:
        assert mdeploy("serve", "llm", model, "--name", "s", "-d").code == 0
        assert mdeploy("stop", "s").code == 0
        pids = processes_with(f"MDEPLOY_HOME={other}")
        from mdeploy.supervise.ports import listens

        assert listens(pids, port)
        assert not listens([os.getpid()], port)
    finally:
        assert mdeploy("stop", "--all", MDEPLOY_HOME=str(other)).code == 0


def test_a_first_request_that_is_refused_is_told_at_once(home: Path, model: Path) -> None:
    result = mdeploy("serve", "llm", model, "--name", "s", "-d", FAKE_VLLM_MODE="refuses")
    assert result.code == 78
    assert "refuses a first request" in result.stderr
    assert "404" in result.stderr
    assert processes_with(f"MDEPLOY_RUN_ID={_state(home)['run_id']}") == []


def test_an_engine_never_sees_secrets_that_are_not_its_own(home: Path, model: Path) -> None:
    secrets = {"MODELSCOPE_API_TOKEN": "ms-secret", "VLLM_API_KEY": "foreign"}
    assert mdeploy("serve", "llm", model, "--name", "s", "-d", **secrets).code == 0  # type: ignore[arg-type]
    for pid in processes.marked(_state(home)["run_id"]):
        environ = Path(f"/proc/{pid}/environ").read_text()
        assert "ms-secret" not in environ
        assert "foreign" not in environ
    assert "ms-secret" not in Path(f"/proc/{_state(home)['pid']}/environ").read_text()


@pytest.mark.parametrize("key", ["schlüssel", "two words", "a\nb"])
def test_a_key_that_fits_no_header_is_refused(home: Path, model: Path, key: str) -> None:
    assert mdeploy("serve", "llm", model, "-d", MDEPLOY_API_KEY=key).code == 2
    assert not (home / "secrets").exists()


def test_files_in_shared_memory_that_are_not_ours_stay(home: Path, model: Path) -> None:
    foreign = Path(f"/dev/shm/mdeploy-test-{os.getpid()}")
    foreign.write_bytes(b"x" * 4096)
    try:
        assert mdeploy("serve", "llm", model, "--name", "s", "-d", FAKE_VLLM_MAPS=str(foreign)).code == 0
        assert str(foreign) in processes.shared_memory(processes.marked(_state(home)["run_id"]))
        assert mdeploy("stop", "s").code == 0
        assert foreign.exists()
    finally:
        foreign.unlink(missing_ok=True)


def test_a_failed_start_leaves_no_scratch_directory(home: Path, model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "s", "-d", MDEPLOY_API_KEY="k").code == 0
    assert mdeploy("stop", "s").code == 0
    (home / "secrets/s.api-key").unlink()
    result = mdeploy("restart", "s")
    assert result.code == 78
    assert "s.api-key" in result.stderr
    assert not Path(_state(home)["scratch"]).exists()


def test_a_damaged_spec_hides_nobody_and_can_be_stopped(home: Path, model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "good", "-d").code == 0
    assert mdeploy("serve", "llm", model, "--name", "bad", "-d").code == 0
    run_id = _state(home, "bad")["run_id"]
    (home / "services/bad/spec.json").write_text("{}")
    (home / "services/foo bak").mkdir()
    (home / "services/foo bak/spec.json").write_text("{}")
    listed = {s["name"]: s for s in mdeploy("ps", "--json").json["services"]}
    assert (listed["good"]["phase"], listed["bad"]["phase"]) == ("ready", "failed")
    assert "spec.json" in listed["bad"]["error"]
    assert mdeploy("stop", "bad").code == 0
    assert processes_with(f"MDEPLOY_RUN_ID={run_id}") == []
    assert mdeploy("serve", "llm", model, "--name", "bad", "-d").code == 0


def test_restart_does_not_end_what_it_could_not_start_again(home: Path, model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "s", "-d").code == 0
    run_id, spec = _state(home)["run_id"], home / "services/s/spec.json"
    whole = spec.read_bytes()
    spec.write_bytes(whole[:100])
    refused = mdeploy("restart", "s")
    assert refused.code == 78
    assert "damaged" in refused.stderr
    assert processes_with(f"MDEPLOY_RUN_ID={run_id}")
    spec.write_bytes(whole)
    assert (ps("s") or {})["phase"] == "ready"


def test_services_of_another_user_are_not_no_services(home: Path, model: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    assert mdeploy("serve", "llm", model, "--name", "s", "-d").code == 0
    for directory in (home, *home.parents):
        if directory.stat().st_uid == 0 and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o055)
    code = (
        "import os, sys; from pathlib import Path; from mdeploy.errors import ConfigError\n"
        "from mdeploy.paths import Paths; from mdeploy.supervise import state\n"
        "os.setgid(65534), os.setuid(65534)\n"
        "try: state.names(Paths(Path(sys.argv[1])))\n"
        "except ConfigError as error: print(error.message)\n"
    )
    asked = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, text=True, check=True)
    assert "belongs to another user" in asked.stdout


def test_stop_goes_on_after_a_name_that_is_unknown(model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "b", "-d").code == 0
    assert mdeploy("stop", "nosuch", "b").code == 3
    assert (ps("b") or {})["phase"] == "stopped"


def test_after_a_reboot_stop_settles_it(home: Path, model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "s", "-d").code == 0
    assert mdeploy("stop", "s").code == 0
    (home / "services/s/state.json").write_text(json.dumps({**_state(home), "phase": "ready", "boot_id": "earlier"}))
    assert (ps("s") or {})["error"] == "the machine was restarted"
    assert mdeploy("stop", "s").code == 0
    assert ((ps("s") or {})["phase"], (ps("s") or {})["error"]) == ("stopped", None)


def _fill(file: Path) -> None:
    """Take what is left of a disk."""
    with file.open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(b"x" * 1000)


def test_a_full_disk_does_not_end_a_healthy_service(home: Path, model: Path, tmp_path: Path) -> None:
    """State and log lie on a file system of 1 MiB that is then filled to the last byte."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    (home / "services").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(home / "services")], check=True)
    try:
        sick = tmp_path / "sick"
        assert mdeploy("serve", "llm", model, "--name", "s", "-d", FAKE_VLLM_SICK=str(sick)).code == 0
        filler = home / "services" / "filler"
        _fill(filler)
        engine = _state(home)["engine_pid"]
        sick.touch()
        until(lambda: sick.read_text().count("asked") > 4, what="the supervisor has seen it")
        assert _state(home)["phase"] == "ready"  # and cannot write it down
        filler.unlink()
        until(lambda: (ps("s") or {})["phase"] == "unhealthy", what="the state is written once there is room")
        sick.unlink()
        until(lambda: (ps("s") or {})["phase"] == "ready", what="recovery")
        assert _state(home)["engine_pid"] == engine
        _fill(filler)
        refused = mdeploy("keys", "add", "s")
        assert (refused.code, refused.stderr.count("No space left")) == (78, 1)
        assert (ps("s") or {})["phase"] == "ready"
        assert mdeploy("stop", "s").code == 0
        assert ((ps("s") or {})["phase"], (ps("s") or {})["error"]) == ("stopped", None)
    finally:
        subprocess.run(["umount", "-l", str(home / "services")], check=True)


def test_a_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f"cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} -m mdeploy ps"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, "current directory does not exist" in done.stderr) == (78, True)


def test_a_machine_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SHM", Path("/nowhere"))
    assert processes.shared_memory([os.getpid()]) == frozenset()
    assert processes.all_shared_memory() == frozenset()


def test_modules_in_the_current_directory_are_not_imported(home: Path, model: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "typer.py").write_text("raise SystemExit(9)")
    command = [str(Path(sys.executable).parent / "mdeploy"), "serve", "llm", str(model), "--name", "s"]
    with subprocess.Popen(command, cwd=trap, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until(lambda: (s := ps("s")) and s["phase"] == "ready", what="ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("sig", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_stops_what_a_waiting_serve_had_begun(home: Path, model: Path, sig: int) -> None:
    with running("serve", "llm", model, "--name", "s", "-d", FAKE_VLLM_MODE="never-answers") as process:
        until(lambda: (s := ps("s")) and s["phase"] == "starting" and _state(home)["engine_pid"], what="starting")
        process.send_signal(sig)
        assert process.wait(60) == 128 + sig
    assert processes_with(f"MDEPLOY_RUN_ID={_state(home)['run_id']}") == []


def test_nohup_keeps_a_foreground_service(home: Path, model: Path) -> None:
    command = ["nohup", sys.executable, "-m", "mdeploy", "serve", "llm", str(model), "--name", "s"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: (s := ps("s")) and s["phase"] == "ready", what="ready")
        process.send_signal(signal.SIGHUP)
        assert mdeploy("bench", "nobody").code == 3  # time for the signal to arrive
        assert (ps("s") or {})["phase"] == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_an_interrupted_demo_leaves_nothing(home: Path) -> None:
    with running("demo", FAKE_VLLM_MODE="never-answers") as process:
        until(
            lambda: {*processes_with("MDEPLOY_RUN_ID=")} & {*processes_with("mdeploy-demo-")},
            what="the engine of the demo runs",
        )
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert processes_with("mdeploy-demo-") == []
    assert not list(Path(tempfile.gettempdir()).glob("mdeploy-demo-*"))
