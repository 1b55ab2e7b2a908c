"""A service from start to end, with a stand-in engine: what ps says is true, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm_env import segments
from tests.support import free_port, listens, mdeploy, processes_with, ps, running, tiny_model, until

pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "org" / "tiny")


def _serve(model: Path, *args: str, **env: str) -> Any:
    return mdeploy("serve", "llm", model, "--name", "s", "-d", *args, **env)  # type: ignore[arg-type]


def _state(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "services/s/state.json").read_text()))


def _left(home: Path) -> list[int]:
    return processes_with(f"MDEPLOY_RUN_ID={_state(home)['run_id']}")


def test_serve_ps_stop(home: Path, model: Path) -> None:
    before, port = segments(home), free_port()
    result = _serve(model, "--port", str(port), "--json")
    assert result.code == 0, result.stderr
    service = result.json["service"]
    assert service == ps("s")
    assert (service["phase"], service["port"], service["error"]) == ("ready", port, None)
    assert service["url"] == f"http://127.0.0.1:{port}"
    assert "asking for a first token" in result.stderr
    assert len(_left(home)) == 2  # the API server and its core
    assert len(segments(home) - before) == 1
    assert mdeploy("stop", "s").code == 0
    assert (ps("s") or {})["phase"] == "stopped"
    assert _left(home) == []
    assert not listens(port)
    assert segments(home) == before
    again = mdeploy("stop", "s")
    assert (again.code, again.stderr) == (0, "s was not running\n")


def _core(home: Path) -> int:
    engine = _state(home)["engine_pid"]
    return next(pid for pid in _left(home) if pid != engine)


def _victim(home: Path, which: str) -> int:
    state = _state(home)
    return int({"core": _core(home), "engine": state["engine_pid"], "supervisor": state["pid"]}[which])


def _respec(home: Path, restart: str = "on-failure", **limits: float) -> None:
    """What a service is started with from now on."""
    path = home / "services/s/spec.json"
    spec = json.loads(path.read_text())
    spec["restart"] = restart
    spec["limits"].update(limits)
    path.write_text(json.dumps(spec))


def _is_back(home: Path, old_run: str) -> bool:
    service, now = ps("s") or {}, _state(home)
    return bool(service["phase"] == "ready" and now["run_id"] != old_run)


@pytest.mark.parametrize("which", ["core", "engine", "supervisor"])
def test_kill_9_is_mended(home: Path, model: Path, which: str) -> None:
    before, port = segments(home), free_port()
    assert _serve(model, "--port", str(port)).code == 0
    run = _state(home)["run_id"]
    os.kill(_victim(home, which), signal.SIGKILL)
    until(lambda: _is_back(home, run), what="ready again")
    assert processes_with(f"MDEPLOY_RUN_ID={run}") == []
    assert len(segments(home) - before) == 1
    assert ((ps("s") or {})["restarts"], (ps("s") or {})["error"]) == (1, None)
    assert "starting again in 1 s" in (home / "services/s/log").read_text()
    assert mdeploy("stop", "s").code == 0
    assert _left(home) == []
    assert processes_with(f"MDEPLOY_HOME={home}") == []
    assert not listens(port)
    assert segments(home) == before


@pytest.mark.parametrize("which", ["core", "engine", "supervisor"])
def test_kill_9_of_a_service_that_is_never_restarted(home: Path, model: Path, which: str) -> None:
    before, port = segments(home), free_port()
    assert _serve(model, "--port", str(port)).code == 0
    _respec(home, "never")
    assert mdeploy("restart", "s").code == 0
    os.kill(_victim(home, which), signal.SIGKILL)
    failed = until(lambda: (s := ps("s")) and s["phase"] == "failed" and s, 5, "ps tells of the death")
    assert failed["pid"] is None
    assert failed["error"]
    until(lambda: not _left(home) and segments(home) == before, what="it is cleared without being asked")
    assert mdeploy("stop", "s").code == 0
    assert _left(home) == []
    assert not listens(port)
    assert segments(home) == before
    assert mdeploy("restart", "s").code == 0
    assert (ps("s") or {})["phase"] == "ready"


def test_the_name_is_taken_while_it_runs(model: Path) -> None:
    assert _serve(model).code == 0
    second = _serve(model)
    assert second.code == 1
    assert "already running" in second.stderr
    assert "mdeploy stop s" in second.stderr
    assert (ps("s") or {})["phase"] == "ready"


def test_the_port_is_taken(model: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = _serve(model, "--port", str(other.getsockname()[1]))
    assert result.code == 78
    assert "Address already in use" in result.stderr
    assert "--port" in result.stderr
    assert ps("s") is None


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [("no-kv", 5, "KV cache of one request does not fit"), ("bad-config", 78, "quantization method awx")],
)
def test_a_start_that_fails_tells_the_cause(home: Path, model: Path, mode: str, code: int, says: str) -> None:
    result = _serve(model, FAKE_VLLM_MODE=mode)
    assert result.code == code
    assert says in result.stderr
    service = ps("s") or {}
    assert service["phase"] == "failed"
    assert says in service["error"]
    assert _left(home) == []


def test_an_engine_that_is_healthy_but_never_answers_is_not_ready(home: Path, model: Path) -> None:
    result = _serve(model, "--start-timeout", "3", FAKE_VLLM_MODE="never-answers")
    assert result.code == 4
    assert "500" in result.stderr
    assert _left(home) == []


def test_a_guard_that_is_killed_is_replaced(home: Path, model: Path) -> None:
    assert _serve(model).code == 0
    state = _state(home)
    guards = _guards(home)
    assert len(guards) == 1
    os.kill(guards[0], signal.SIGSTOP)
    until(lambda: ") S " in Path(f"/proc/{guards[0]}/stat").read_text(), what="a stopped one is woken")
    os.kill(guards[0], signal.SIGKILL)
    until(lambda: (now := _guards(home)) and now != guards, what="another guard")
    assert (_state(home)["pid"], _state(home)["run_id"]) == (state["pid"], state["run_id"])
    os.kill(state["pid"], signal.SIGKILL)
    until(lambda: _is_back(home, state["run_id"]), what="ready again")


def _guards(home: Path) -> list[int]:
    ours = processes_with(f"MDEPLOY_HOME={home}")
    return [pid for pid in ours if "guard.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_everything_killed_at_once(home: Path, model: Path) -> None:
    """Nobody is left to mend it; what there is to see is true, and the next command clears it."""
    before = segments(home)
    assert _serve(model).code == 0
    for pid in processes_with(f"MDEPLOY_HOME={home}"):
        os.kill(pid, signal.SIGKILL)
    until(lambda: (ps("s") or {})["phase"] == "failed", 5)
    assert mdeploy("restart", "s").code == 0
    assert mdeploy("stop", "s").code == 0
    assert segments(home) == before


def test_a_torn_record_is_written_again(home: Path, model: Path) -> None:
    assert _serve(model).code == 0
    record = home / "services/s/state.json"
    whole = record.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\0" * 100):
        record.write_bytes(damage)
        until(lambda: record.read_bytes() == whole, what="the record is whole again")


def test_a_hung_engine_is_replaced(home: Path, model: Path) -> None:
    """Its API server still says 200: what hangs is the core behind it."""
    assert _serve(model).code == 0
    _respec(home, health_interval_s=0.2, health_timeout_s=0.3)
    assert mdeploy("restart", "s").code == 0
    run = _state(home)["run_id"]
    os.kill(_core(home), signal.SIGSTOP)
    until(lambda: _is_back(home, run), what="ready again")
    assert "hangs" in (home / "services/s/log").read_text()


@pytest.fixture
def hung(model: Path, home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A ready service with short deadlines; requests hang while the first file exists, the second says it works."""
    files = {"FAKE_VLLM_HUNG": tmp_path / "hung", "FAKE_VLLM_BUSY": tmp_path / "busy"}
    env = {name: str(path) for name, path in files.items()}
    assert _serve(model, **env).code == 0
    _respec(home, health_interval_s=0.1, answer_interval_s=0.2, hang_timeout_s=1)
    assert mdeploy("restart", "s", **env).code == 0  # type: ignore[arg-type]
    return files["FAKE_VLLM_HUNG"], files["FAKE_VLLM_BUSY"]


def test_an_engine_that_is_healthy_and_answers_nothing_is_replaced(home: Path, hung: tuple[Path, Path]) -> None:
    run = _state(home)["run_id"]
    hung[0].touch()
    until(lambda: "no request got on" in (home / "services/s/log").read_text(), what="the hang is seen")
    hung[0].unlink()
    until(lambda: _is_back(home, run), what="ready again")


def test_an_engine_that_is_busy_with_others_is_left_alone(home: Path, hung: tuple[Path, Path]) -> None:
    """The same silence towards us, but its counters of work move."""
    stuck, busy = hung
    run = _state(home)["run_id"]
    busy.touch()
    stuck.touch()
    until(lambda: busy.read_text().count("worked") > 40, what="four times as long as a hang would have lasted")
    assert ((ps("s") or {})["phase"], _state(home)["run_id"]) == ("ready", run)
    busy.unlink()
    until(lambda: _state(home)["run_id"] != run, what="and now it hangs")
    stuck.unlink()


def test_a_slow_engine_is_left_alone(home: Path, model: Path) -> None:
    """A process that was stopped and goes on in time was slow, not hung."""
    assert _serve(model).code == 0
    run = _state(home)["run_id"]
    core = _core(home)
    os.kill(core, signal.SIGSTOP)
    until(lambda: (ps("s") or {})["phase"] == "unhealthy", 5, "ps tells of it")
    os.kill(core, signal.SIGCONT)
    until(lambda: (ps("s") or {})["phase"] == "ready")
    assert _state(home)["run_id"] == run


def test_a_stopped_supervisor_can_be_told_to_stop(home: Path, model: Path) -> None:
    assert _serve(model).code == 0
    os.kill(_state(home)["pid"], signal.SIGSTOP)
    assert mdeploy("stop", "s").code == 0
    assert processes_with(f"MDEPLOY_HOME={home}") == []


def test_hang_up_reloads_where_the_engine_can(
    home: Path, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as below nohup: a service of ours heeds it all the same
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    note = tmp_path / "reloaded"
    assert _serve(model, FAKE_VLLM_RELOADED=str(note)).code == 0
    os.kill(_state(home)["pid"], signal.SIGHUP)
    until(lambda: "cannot reload" in (home / "services/s/log").read_text())
    assert not note.exists()
    path = home / "services/s/spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reloads": True}))
    assert mdeploy("restart", "s", FAKE_VLLM_RELOADED=str(note)).code == 0
    run = _state(home)["run_id"]
    os.kill(_state(home)["pid"], signal.SIGHUP)
    until(note.exists, what="the engine has seen it")
    assert ((ps("s") or {})["phase"], _state(home)["run_id"]) == ("ready", run)


def test_an_engine_that_ignores_term_is_killed(home: Path, model: Path) -> None:
    assert _serve(model, "--drain", "1", FAKE_VLLM_MODE="ignores-term").code == 0
    assert mdeploy("stop", "s").code == 0
    assert _left(home) == []


def test_a_sick_engine_is_unhealthy_and_recovers(home: Path, model: Path, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    assert _serve(model, FAKE_VLLM_SICK=str(sick)).code == 0
    sick.touch()
    until(lambda: (ps("s") or {})["phase"] == "unhealthy", what="three misses in a row")
    sick.unlink()
    until(lambda: (ps("s") or {})["phase"] == "ready", what="recovery")


def test_the_key_is_asked_for_and_shown_nowhere(home: Path, model: Path) -> None:
    secret = "sk-do-not-show-me"
    shown = mdeploy("serve", "llm", model, "--dry-run", MDEPLOY_API_KEY=secret)
    assert "VLLM_API_KEY=***" in shown.stdout
    result = _serve(model, "--host", "0.0.0.0", "--json", MDEPLOY_API_KEY=secret)
    assert result.code == 0, result.stderr
    files = [
        p for p in home.rglob("*") if p.is_file() and not p.is_symlink() and secret in p.read_text(errors="replace")
    ]
    assert [p.relative_to(home).as_posix() for p in files] == ["secrets/s.api-key"]
    assert files[0].stat().st_mode & 0o777 == 0o600
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in _left(home)]
    assert not any(secret in text for text in [*commands, result.stdout, result.stderr, shown.stdout, shown.stderr])
    import httpx

    url = f"{result.json['service']['url']}/v1/completions"
    assert httpx.post(url, json={}, trust_env=False).status_code == 401
    headers = {"Authorization": f"Bearer {secret}"}
    assert httpx.post(url, json={}, headers=headers, trust_env=False).status_code == 200


def test_another_address_without_a_key_is_refused(model: Path) -> None:
    result = _serve(model, "--host", "0.0.0.0")
    assert result.code == 2
    assert "MDEPLOY_API_KEY" in result.stderr
    assert _serve(model, "--host", "0.0.0.0", "--insecure").code == 0


def test_foreground_streams_the_log_and_ctrl_c_stops_cleanly(home: Path, model: Path) -> None:
    with running("serve", "llm", model, "--name", "s") as process:
        assert process.stdout is not None
        until(lambda: (s := ps("s")) and s["phase"] == "ready", what="ready")
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Application startup complete" in out
    assert "Traceback" not in out + err
    assert (ps("s") or {})["phase"] == "stopped"
    assert _left(home) == []


def test_ctrl_c_while_waiting_for_a_detached_start_stops_it(home: Path, model: Path) -> None:
    with running("serve", "llm", model, "--name", "s", "-d", FAKE_VLLM_MODE="never-answers") as process:
        until(lambda: (s := ps("s")) and s["phase"] == "starting" and _left(home), what="starting")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert (ps("s") or {})["phase"] == "stopped"
    assert _left(home) == []


def test_logs_tail_and_follow_until_the_end(home: Path, model: Path) -> None:
    assert _serve(model).code == 0
    assert mdeploy("logs", "s", "-n", "1").stdout.endswith("Application startup complete.\n")
    command = [sys.executable, "-m", "mdeploy", "logs", "s", "-f"]
    _respec(home, "never")
    assert mdeploy("restart", "s").code == 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        os.kill(_core(home), signal.SIGKILL)
        out, _ = follower.communicate(timeout=30)
    assert "EngineCore died" in out
    assert follower.returncode == 0


def test_two_stops_at_once(home: Path, model: Path) -> None:
    assert _serve(model).code == 0
    with running("stop", "s") as first, running("stop", "s") as second:
        assert first.wait(30) == 0
        assert second.wait(30) == 0
    assert _left(home) == []


def test_unknown_names() -> None:
    for verb in ("stop", "restart", "logs", "run"):
        assert mdeploy(verb, "nobody").code == 3
        assert mdeploy(verb, "../../etc").code == 2
