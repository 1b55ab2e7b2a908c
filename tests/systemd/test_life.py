"""Under a real systemd: killed in any way it is ready again, stopped it leaves nothing, a boot brings it back."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support import until
from tests.systemd.box import ENGINE, HOME, MODEL, Box

KEY = "sk-of-the-service"
_PATTERN = "sk-of-the-servic[e]"
"""Finds the key, and not the search for it."""


_KILLS = {"main": slice(0, 1), "engine": slice(1, 2), "core": slice(2, 3), "everything": slice(0, 3)}


@pytest.fixture(scope="module")
def service(shared_box: Box) -> Iterator[Box]:
    """An installed service with a key, for tests that leave it as ready as they found it."""
    result = shared_box.mdeploy("serve", "llm", MODEL, "--name", "s", "-d", MDEPLOY_API_KEY=KEY)
    assert result.code == 0, result.stderr
    result = shared_box.mdeploy("install-systemd", "s")
    assert result.code == 0, result.stderr
    yield shared_box
    shared_box.clean()


def _pids(box: Box, name: str) -> list[str]:
    """Supervisor, API server, engine core."""
    record = box.ready(name)
    engine, main = record["engine_pid"], record["pid"]
    core = next(pid for pid in box.processes(record["run_id"]) if pid not in (engine, main))
    return [str(main), str(engine), str(core)]


def _shm(box: Box, pid: str) -> str:
    """What lies in the private shared memory of a service."""
    return box.ok("ls", f"/proc/{pid}/root/dev/shm")


@pytest.mark.parametrize("which", _KILLS)
def test_kill_9_and_it_is_ready_again(service: Box, which: str) -> None:
    victims, before = _pids(service, "s")[_KILLS[which]], service.state("s")
    service.run("kill", "-9", *victims)  # a death may be quicker than our next kill
    after = service.ready("s", after=before["run_id"])
    assert service.ask(8000, KEY) == 200
    assert service.processes(before["run_id"]) == []
    assert len(service.processes(after["run_id"])) == 2
    assert len(_shm(service, str(after["pid"])).split()) == 1
    assert (service.ps("s") or {})["phase"] == "ready"


def test_stop_leaves_no_process_and_no_shared_memory(service: Box) -> None:
    main, run_id = _pids(service, "s")[0], service.state("s")["run_id"]
    assert _shm(service, main).startswith("psm_fake")
    result = service.mdeploy("stop", "s")
    assert result.code == 0, result.stderr
    assert "starts again at the next boot" in result.stderr
    assert service.processes(run_id) == []
    assert service.ok("ls", "/dev/shm") == ""
    assert service.run("ls", f"/proc/{main}").code != 0
    assert (service.ps("s") or {})["phase"] == "stopped"
    assert service.mdeploy("stop", "s").stderr.startswith("s was not running")
    assert service.mdeploy("restart", "s", MDEPLOY_API_KEY=KEY).code == 0
    assert service.ask(8000, KEY) == 200


def test_what_systemd_starts_again_is_starting(service: Box) -> None:
    """Ended by somebody else, as by systemd where memory runs out, the supervisor itself wrote `stopped`."""
    before = service.state("s")["run_id"]
    override = "/etc/systemd/system/mdeploy@s.service.d/95-test.conf"
    service.write(override, "[Service]\nRestartSec=1h\n")
    service.ok("systemctl", "kill", "--kill-who=main", "mdeploy@s")
    until(lambda: service.shows("s", "SubState") == "auto-restart", 30)
    assert service.state("s")["phase"] == "stopped"
    assert (service.ps("s") or {})["phase"] == "starting"
    shown = service.mdeploy("ps")
    assert "systemd starts it again" in shown.stdout + shown.stderr
    service.ok("rm", override)
    service.ok("systemctl", "daemon-reload")
    service.ok("systemctl", "restart", "mdeploy@s")
    service.ready("s", after=before)


def test_it_runs_as_an_ordinary_user_in_its_sandbox(service: Box) -> None:
    main, engine, core = _pids(service, "s")
    uid = service.ok("id", "-u", "mdeploy").strip()
    assert uid != "0"
    for pid in (main, engine, core):
        status = dict(line.split(":\t", 1) for line in service.ok("cat", f"/proc/{pid}/status").splitlines())
        assert set(status["Uid"].split()) == {uid}
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapBnd"], 16) == 0
    assert service.shows("s", "ProtectSystem") == "strict"
    tried = json.loads(_inside(service, main, uid, _TRY))
    assert tried == {
        "write /etc": "EROFS",
        "write /usr": "EROFS",
        "write /srv": "EROFS",
        "write own": "ok",
        "write cache": "ok",
        "write shm": "ok",
        "replace spec": "EPERM",
        "read key": "ENOENT",
        "list home": ["services"],
        "list services": ["s"],
        "list /home": [],
    }


_TRY = f"""
import errno, json, os, pathlib
def attempt(action):
    try:
        action()
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
def write(directory):
    path = pathlib.Path(directory, "attempt")
    return attempt(lambda: (path.write_text("x"), path.unlink()))
home = pathlib.Path({HOME!r})
print(json.dumps({{
    "write /etc": write("/etc"),
    "write /usr": write("/usr"),
    "write /srv": write("/srv"),
    "write own": write(home / "services/s"),
    "write cache": write("/var/cache/mdeploy/s"),
    "write shm": write("/dev/shm"),
    "replace spec": attempt(lambda: (home / "services/s/spec.json").unlink()),
    "read key": attempt((home / "secrets/s.api-key").read_text),
    "list home": os.listdir(home),
    "list services": os.listdir(home / "services"),
    "list /home": os.listdir("/home"),
}}))
"""


def _inside(box: Box, pid: str, uid: str, code: str) -> str:
    """Run Python where a service lives: its mounts, its user."""
    return box.ok(
        *("nsenter", "-t", pid, "--mount", "--", "setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"),
        *(f"{ENGINE}/bin/python", "-c", code),
    )


def test_the_key_shows_nowhere_but_in_the_engine(service: Box) -> None:
    main, engine, _ = _pids(service, "s")
    holders = service.run("grep", "-lsa", _PATTERN, "-r", "/proc", "--include=environ").stdout.split()
    pids = {path.split("/")[2] for path in holders}
    assert engine in pids
    assert main not in pids
    assert service.run("grep", "-lsa", _PATTERN, "-r", "/proc", "--include=cmdline").stdout == ""
    places = ("/etc/systemd", f"{HOME}/services", "/run/systemd/system", "/var/log", "/run/log")
    assert service.run("grep", "-rlsa", _PATTERN, *places).stdout == ""
    shown = service.mdeploy("install-systemd", "s", "--dry-run")
    assert "LoadCredential=s.api-key:" in shown.stdout
    assert KEY not in shown.stdout + shown.stderr
    assert KEY not in service.ok("systemctl", "show", "mdeploy@s")


def test_an_ordinary_user_sees_it_and_may_not_stop_it(service: Box) -> None:
    seen = service.ps("s", user="alice")
    assert seen is not None
    assert (seen["phase"], seen["manager"], seen["port"]) == ("ready", "systemd", 8000)
    assert "s " in service.mdeploy("ps", user="alice").stdout
    refused = service.mdeploy("stop", "s", user="alice", MDEPLOY_HOME=HOME)
    assert refused.code == 1
    assert "sudo" in refused.stderr
    assert service.run("setpriv", "--reuid=alice", "--regid=alice", "--clear-groups", "cat", _KEY_FILE).code != 0
    assert service.ask(8000, KEY) == 200


_KEY_FILE = f"{HOME}/secrets/s.api-key"


@pytest.mark.parametrize("how", ["reboot", "power cut"])
def test_a_boot_brings_it_back(service: Box, how: str) -> None:
    before = service.state("s")["run_id"]
    service.reboot() if how == "reboot" else service.cut_power()
    service.ready("s", after=before)
    assert service.ask(8000, KEY) == 200
    seen = service.ps("s") or {}
    assert (seen["phase"], seen["manager"]) == ("ready", "systemd")
