"""`mdeploy keys` on services with a stand-in engine: who is let in, what is shown, what a failure leaves."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from mdeploy import prepare, settings
from mdeploy.errors import MdeployError
from mdeploy.supervise.state import ServiceFiles
from tests.support import Result, free_port, mdeploy, processes_with, ps, running, tiny_model, until

pytestmark = pytest.mark.usefixtures("fake_engine")

OLD, NEW = "sk-old-key-of-a-test", "sk-new-key-of-a-test"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "org" / "tiny")


@pytest.fixture
def service(model: Path) -> str:
    """A service `s` that is ready and has the key OLD; returns its completions URL."""
    return _serve(model, "s", MDEPLOY_API_KEY=OLD)


@pytest.fixture
def open_service(model: Path) -> str:
    """The same without a key."""
    return _serve(model, "s")


def _serve(model: Path, name: str, *args: str, **env: str) -> str:
    """Serve detached, on a port that no other suite on this machine has; returns the completions URL."""
    words = ("serve", "llm", model, "--name", name, "-d", "--json", "--port", str(free_port()), *args)
    served = mdeploy(*words, **env)  # type: ignore[arg-type]
    assert served.code == 0, served.stderr
    return f"{served.json['service']['url']}/v1/completions"


def _keys(*args: str, given: str | None = None, **env: str) -> Result:
    command = [sys.executable, "-m", "mdeploy", "keys", *args]
    done = subprocess.run(
        command, input=given or "", capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **env}
    )
    return Result(done.returncode, done.stdout, done.stderr)


def _status(url: str, key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(url, json={}, headers=headers, trust_env=False).status_code


def _spec(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "services/s/spec.json").read_text()))


def _change_spec(home: Path, **change: Any) -> None:
    path = home / "services/s/spec.json"
    path.write_text(json.dumps({**_spec(home), **change}))


def _record(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "services/s/state.json").read_text()))


def _file(home: Path) -> Path:
    return home / "secrets/s.api-key"


def _fingerprint(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _holders(home: Path, key: str) -> list[str]:
    """Everything of the home, and of the processes around it, that shows a key: files, arguments, environments."""
    found = [
        p.relative_to(home).as_posix()
        for p in home.rglob("*")
        if p.is_file() and not p.is_symlink() and key in p.read_text(errors="replace")
    ]
    for pid in processes_with(f"MDEPLOY_HOME={home}"):
        for name in ("cmdline", "environ"):
            if key in Path(f"/proc/{pid}/{name}").read_text(errors="replace"):
                found.append(f"{name} of {Path(f'/proc/{pid}/cmdline').read_text()}")
    return found


def test_the_first_key_of_a_running_service_closes_it(home: Path, open_service: str) -> None:
    assert _status(open_service, None) == 200
    added = _keys("add", "s")
    assert added.code == 0, added.stderr
    key = added.stdout.removesuffix("\n")
    assert key.startswith("sk-")
    assert len(key) > 40
    assert (_status(open_service, None), _status(open_service, key)) == (401, 200)
    assert (ps("s") or {})["phase"] == "ready"
    assert (_file(home).stat().st_mode & 0o777, _file(home).parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "at the next start" not in added.stderr
    again = _keys("add", "s")
    assert (again.code, again.stdout) == (2, "")
    assert "mdeploy keys rotate s" in again.stderr


def test_a_key_is_in_one_file_and_in_the_environment_of_its_engine_only(home: Path, open_service: str) -> None:
    key = _keys("add", "s").stdout.strip()
    shown = mdeploy("serve", "llm", home.parent / "org/tiny", "--name", "s", "--dry-run")
    assert key not in shown.stdout + shown.stderr
    files, engines = _holders(home, key)[:1], _holders(home, key)[1:]
    assert files == ["secrets/s.api-key"]
    assert engines
    assert all(holder.startswith("environ of ") and "mdeploy" not in holder for holder in engines)
    bench = mdeploy("bench", "s", "-n", "2", "-c", "1", "--model", "tiny")
    assert "does not stream" in bench.stderr  # all a stand-in can say to one that is let in


def test_a_key_for_a_service_that_is_stopped(home: Path, open_service: str) -> None:
    assert mdeploy("stop", "s").code == 0
    added = _keys("add", "s", "--stdin", given=f"{NEW}\n")
    assert (added.code, added.stdout) == (0, "")
    assert "at the next start" in added.stderr
    assert mdeploy("restart", "s").code == 0
    assert (_status(open_service, None), _status(open_service, NEW)) == (401, 200)
    assert mdeploy("stop", "s").code == 0
    assert _keys("rm", "s").code == 0
    assert not _file(home).exists()
    assert (_spec(home)["secrets"], _spec(home)["probe"]["bearer"]) == ({}, None)
    assert mdeploy("restart", "s").code == 0
    assert _status(open_service, None) == 200


def test_rotate_starts_again_with_the_new_key_alone(home: Path, service: str) -> None:
    rotated = _keys("rotate", "s")
    assert rotated.code == 0, rotated.stderr
    key = rotated.stdout.strip()
    assert [_status(service, k) for k in (key, OLD, None)] == [200, 401, 401]
    assert _file(home).read_text() == f"{key}\n"
    assert OLD not in rotated.stdout + rotated.stderr
    assert key not in rotated.stderr


def test_rotate_without_a_restart_waits_for_the_next_start(service: str) -> None:
    assert _keys("rotate", "s", "--stdin", "--no-restart", given=NEW).code == 0
    assert _status(service, OLD) == 200
    assert mdeploy("restart", "s").code == 0
    assert [_status(service, k) for k in (NEW, OLD)] == [200, 401]


def test_ls_shows_fingerprints_and_no_key(home: Path, service: str, model: Path) -> None:
    _serve(model, "open")
    listed = _keys("ls", "--json").stdout
    rows = {row["service"]: row for row in json.loads(listed)["keys"]}
    assert rows["s"]["fingerprints"] == [_fingerprint(OLD)]
    assert (rows["s"]["keys"], rows["open"]["keys"], rows["open"]["since"]) == (1, 0, None)
    table = _keys("ls").stdout
    assert _fingerprint(OLD) in table
    assert "none: open" in table
    assert OLD not in listed + table
    one = _keys("ls", "s").stdout
    assert "open" not in one
    _file(home).unlink()
    assert "file is gone" in _keys("ls", "s").stdout


@pytest.mark.parametrize("bad", ["two words", "schlüssel", "a\nb", "x" * 2000])
def test_a_bad_key_is_refused_and_not_repeated(service: str, bad: str) -> None:
    result = _keys("rotate", "s", "--stdin", given=bad)
    assert (result.code, result.stdout) == (2, "")
    assert bad not in result.stderr
    assert _status(service, OLD) == 200


def test_a_key_as_an_argument_is_refused_and_not_repeated(service: str) -> None:
    for verb in ("add", "rotate"):
        result = _keys(verb, "s", NEW)
        assert result.code == 2
        assert "--stdin" in result.stderr
        assert NEW not in result.stdout + result.stderr


def test_no_key_on_stdin_and_the_same_key_again(service: str) -> None:
    assert "no key" in _keys("rotate", "s", "--stdin").stderr
    same = _keys("rotate", "s", "--stdin", given=OLD)
    assert (same.code, OLD in same.stderr) == (2, False)
    assert _status(service, OLD) == 200


def test_a_terminal_is_asked_without_an_echo(home: Path, open_service: str) -> None:
    assert mdeploy("stop", "s").code == 0
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "mdeploy", "keys", "add", "s", "--stdin"])
    shown = b""
    with os.fdopen(terminal, "r+b", 0) as keyboard:
        while b"key of s: " not in shown:
            shown += keyboard.read(100)
        keyboard.write(f"{NEW}\n".encode())
        try:
            while data := keyboard.read(1000):
                shown += data
        except OSError:  # how a terminal says that its last user has left
            assert os.waitpid(pid, 0)[1] == 0, shown
    assert NEW.encode() not in shown
    assert _file(home).read_text() == f"{NEW}\n"


def test_where_the_start_fails_the_old_key_comes_back(home: Path, service: str, tmp_path: Path) -> None:
    """The engine takes every key but the new one: then the next start, with the old one, is good."""
    result = _keys("rotate", "s", "--stdin", given=NEW, FAKE_VLLM_REFUSES_KEY=NEW)
    assert result.code != 0
    assert "the old key is back and s runs with that" in result.stderr
    assert NEW not in result.stderr
    assert _file(home).read_text().split() == [OLD]
    assert [_status(service, k) for k in (OLD, NEW)] == [200, 401]


def test_where_the_first_key_fails_the_service_is_open_as_before(home: Path, open_service: str) -> None:
    before = _spec(home)
    result = _keys("add", "s", "--stdin", given=NEW, FAKE_VLLM_REFUSES_KEY=NEW)
    assert result.code != 0
    assert "no key, as before" in result.stderr
    assert _spec(home) == before
    assert not _file(home).exists()
    assert _status(open_service, None) == 200


def _interrupted(home: Path, verb: str, loads: Path) -> str:
    """What a change says that is interrupted while the engine loads, and once more while it is taken back."""
    before = _record(home)["run_id"]
    loads.touch()
    with running("keys", verb, "s", FAKE_VLLM_LOADS=str(loads)) as process:
        assert process.stderr is not None
        until(lambda: _record(home)["run_id"] not in ("", before), what="it is started with the new key")
        process.send_signal(signal.SIGINT)
        said = ""
        while "taken back" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    loads.unlink()
    until(lambda: (ps("s") or {})["phase"] == "ready", what="the service is back without another command")
    return said + rest


def test_an_interrupted_rotation_goes_on_with_the_old_key(home: Path, service: str, tmp_path: Path) -> None:
    said = _interrupted(home, "rotate", tmp_path / "loads")
    assert "with its old key" in said
    assert "error" not in said
    assert _file(home).read_text().split() == [OLD]
    assert [_status(service, k) for k in (OLD, None)] == [200, 401]


def test_an_interrupted_first_key_leaves_the_service_open(home: Path, open_service: str, tmp_path: Path) -> None:
    before = _spec(home)
    said = _interrupted(home, "add", tmp_path / "loads")
    assert "as before" in said
    assert "error" not in said
    assert (_spec(home), _file(home).exists()) == (before, False)
    assert _status(open_service, None) == 200


def test_serve_and_keys_do_not_change_a_key_at_once(home: Path, service: str, model: Path) -> None:
    assert mdeploy("stop", "s").code == 0
    before = _spec(home)
    again = ("serve", "llm", model, "--name", "s", "-d")
    with (home / "secrets/.s.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        served = mdeploy(*again, MDEPLOY_API_KEY=NEW)
        assert (served.code, _spec(home), _file(home).read_text().split()) == (1, before, [OLD])
        assert "another command changes the keys of s" in served.stderr
    assert mdeploy(*again, MDEPLOY_API_KEY=NEW).code == 0
    assert _file(home).read_text().split() == [NEW]


def test_a_key_that_came_while_a_service_was_planned_without_one(home: Path, open_service: str) -> None:
    assert mdeploy("stop", "s").code == 0
    loaded = settings.load()
    planned = ServiceFiles(loaded.paths, "s").spec()
    assert _keys("add", "s").code == 0
    with pytest.raises(MdeployError, match="has got a key meanwhile"):
        prepare.save(loaded, planned, None)
    assert _spec(home)["secrets"] != {}


def test_of_two_rotations_at_once_one_is_done_and_its_key_works(home: Path, service: str) -> None:
    with running("keys", "rotate", "s") as first, running("keys", "rotate", "s") as second:
        outcomes = [(*p.communicate(timeout=60), p.returncode) for p in (first, second)]
    done = [out.strip() for out, _, code in outcomes if code == 0]
    assert done
    refused = [err for _, err, code in outcomes if code != 0]
    assert all("another command changes the keys of s" in err for err in refused)
    working = [key for key in done if _status(service, key) == 200]
    assert working == [_file(home).read_text().strip()]
    assert _status(service, OLD) == 401


def test_the_last_key_stays_where_other_machines_could_come_in(home: Path, model: Path) -> None:
    _serve(model, "s", "--host", "0.0.0.0", MDEPLOY_API_KEY=OLD)
    result = _keys("rm", "s")
    assert result.code == 2
    assert "0.0.0.0" in result.stderr
    assert _file(home).exists()
    assert (ps("s") or {})["phase"] == "ready"


def test_an_engine_that_reloads_takes_several_keys_without_a_restart(
    home: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_KEYS", str(_file(home)))
    assert mdeploy("stop", "s").code == 0
    _change_spec(home, reloads=True)
    assert mdeploy("restart", "s").code == 0
    engine = _record(home)["engine_pid"]
    added = _keys("add", "s", "--stdin", given=NEW)
    assert added.code == 0, added.stderr
    assert "reloaded" in added.stderr
    assert [_status(service, k) for k in (NEW, OLD, None)] == [200, 200, 401]
    assert _file(home).read_text().split() == [NEW, OLD]
    listed = json.loads(_keys("ls", "s", "--json").stdout)["keys"][0]
    assert listed["fingerprints"] == [_fingerprint(NEW), _fingerprint(OLD)]
    assert _keys("rm", "s", "--old").code == 0
    until(lambda: _status(service, OLD) == 401, what="the engine has read its keys again")
    third = _keys("rotate", "s").stdout.strip()
    assert [_status(service, k) for k in (third, NEW)] == [200, 401]
    assert _record(home)["engine_pid"] == engine


def test_unknown_services_and_keys_that_are_not_there(open_service: str) -> None:
    for verb in ("add", "rotate", "rm", "ls"):
        assert _keys(verb, "nobody").code == 3
        assert _keys(verb, "../etc").code == 2
    rotated = _keys("rotate", "s")
    assert rotated.code == 2
    assert "mdeploy keys add s" in rotated.stderr
    assert _keys("rm", "s").code == 2
    assert _keys("rm", "s", "--old").code == 2
