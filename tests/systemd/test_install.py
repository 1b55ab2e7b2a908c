"""Services become units of a real systemd and are taken out of it again; what fails leaves all as it was."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.support import until
from tests.systemd.box import ENGINE, HOME, MODEL, Box

KEY = "sk-never-shown"
KEY_FILE = f"{HOME}/secrets/s.api-key"


def _ours(box: Box) -> list[str]:
    """Every file of units, users and caches that mentions us."""
    places = ("/etc/systemd", "/etc/sysusers.d", "/etc/tmpfiles.d", "/var/cache", "/run/systemd/system")
    found = box.run("find", *places, "-name", "*mdeploy*").stdout.split()
    return sorted(path for path in found if "mdeploy@.service.d" not in path)


def _serve(box: Box, key: str = "") -> dict[str, Any]:
    result = box.mdeploy("serve", "llm", MODEL, "--name", "s", "-d", "--json", MDEPLOY_API_KEY=key)
    assert result.code == 0, result.stderr
    return dict(result.json["service"])


def test_install_request_unchanged_uninstall(box: Box) -> None:
    before = _ours(box)
    _serve(box, KEY)
    result = box.mdeploy("install-systemd", "--json")
    assert result.code == 0, result.stderr
    service = result.json["services"][0]
    assert (service["unit"], service["change"], service["phase"]) == ("mdeploy@s.service", "installed", "ready")
    assert "runs in the background" in result.stderr
    assert box.ask(service["port"], KEY) == 200
    assert box.ask(service["port"], "sk-wrong") == 401
    first = box.state("s")["run_id"]
    again = box.mdeploy("install-systemd", "s", "--json")
    assert again.json["services"][0]["change"] == "unchanged"
    assert box.state("s")["run_id"] == first
    assert box.ok("systemctl", "is-enabled", "mdeploy@s").strip() == "enabled"
    assert box.ok("ls", "-ld", f"{HOME}/services/s").startswith("drwxrwxr-t 3 root mdeploy")
    assert box.mdeploy("uninstall-systemd", "s", "--dry-run").stdout.startswith("$ systemctl stop mdeploy@s.service\n")
    gone = box.mdeploy("uninstall-systemd", "s")
    assert (gone.code, gone.stdout) == (0, "s\n"), gone.stderr
    assert _ours(box) == before
    assert box.ok("ls", "-ld", f"{HOME}/services/s").startswith("drwx------ 3 root root")
    assert box.processes(first) == []
    assert box.mdeploy("uninstall-systemd", "s").code == 3
    _restarted_detached(box)


def _restarted_detached(box: Box) -> None:
    result = box.mdeploy("restart", "s", "--json")
    assert result.code == 0, result.stderr
    assert result.json["services"][0]["manager"] == "detached"


# what fails leaves nothing


@pytest.mark.parametrize(("mode", "code", "says"), [("bad-config", 78, "quantization method awx"), ("no-kv", 5, "KV")])
def test_an_engine_that_fails_is_taken_back(box: Box, mode: str, code: int, says: str) -> None:
    before = _ours(box)
    result = box.mdeploy("install-systemd", "--file", box.file(s={"env": {"FAKE_VLLM_MODE": mode}}))
    assert result.code == code, result.stderr
    assert says in result.stderr
    assert "hint:  mdeploy logs" not in result.stderr
    assert "taking back what was changed" in result.stderr
    assert _ours(box) == before
    assert box.run("systemctl", "is-active", "mdeploy@s").stdout.strip() == "inactive"
    assert box.run("ls", f"{HOME}/services/s").code == 2
    assert box.ps("s") is None


def test_what_ran_in_the_background_runs_there_again(box: Box) -> None:
    served = _serve(box)
    box.override("s", "Environment=FAKE_VLLM_MODE=bad-config")
    result = box.mdeploy("install-systemd", "s")
    assert result.code == 78
    now = _detached_again(box)
    assert now["port"] == served["port"]
    assert box.ask(served["port"]) == 200
    assert box.ok("stat", "-c", "%U %a", f"{HOME}/services/s").strip() == "root 700"


def _detached_again(box: Box) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        now = box.ps("s") or {}
        return now if (now["phase"], now["manager"]) == ("ready", "detached") else None

    return dict(until(look, 30, "it runs in the background again"))


def _written(box: Box) -> str:
    """Everything that is on the disk of what a service is."""
    places = f"{HOME}/services/s/spec.json {HOME}/services/s/revisions {HOME}/secrets /etc/systemd/system/mdeploy@s*"
    return box.run("sh", "-c", f"find {places} -type f ! -name '.*' -exec sha256sum {{}} + | sort -k 2").stdout


def test_a_file_that_is_refused_changes_nothing(box: Box) -> None:
    up = box.mdeploy("up", "--file", box.file(s={}), "--json")
    assert up.code == 0, up.stderr
    before, run_id = _written(box), box.state("s")["run_id"]
    result = box.mdeploy("install-systemd", "--file", box.file(s={"port": 80, "auth": {"key": "generate"}}))
    assert result.code == 78
    assert "nothing was changed, because" in result.stderr
    assert "only root may listen on port 80" in result.stderr
    assert _written(box) == before
    assert (box.ps("s") or {})["phase"] == "ready"
    assert box.state("s")["run_id"] == run_id


def test_a_file_that_does_not_start_gives_the_old_service_back(box: Box) -> None:
    """Spec, key, revisions and unit; and it runs again as it ran, in the background or under systemd."""
    up = box.mdeploy("up", "--file", box.file(s={}), "--json")
    assert up.code == 0, up.stderr
    broken = {"env": {"FAKE_VLLM_MODE": "bad-config"}, "auth": {"key": "generate"}}
    before, port = _written(box), (box.ps("s") or {})["port"]
    assert box.mdeploy("install-systemd", "--file", box.file(s=broken)).code == 78
    assert _written(box) == before
    _detached_again(box)
    assert box.ask(port) == 200
    box.install("s")
    before, run_id = _written(box), box.state("s")["run_id"]
    assert box.mdeploy("install-systemd", "--file", box.file(s=broken)).code == 78
    assert _written(box) == before
    box.ready("s", after=run_id)
    assert box.ask(port) == 200


def test_a_failed_update_brings_the_old_unit_back(box: Box) -> None:
    box.install("s")
    shared = f"{HOME}/services/s/shared"
    box.write(shared, "only mdeploy may open this, and the engine must")
    box.ok("chown", "mdeploy", shared)
    box.ok("chmod", "600", shared)
    box.engine_env("s", FAKE_VLLM_MAPS=shared)
    unit = box.ok("cat", "/etc/systemd/system/mdeploy@s.service.d/50-mdeploy.conf")
    before = box.state("s")["run_id"]
    result = box.mdeploy("install-systemd", "s", "--as", "bob")
    assert result.code == 1, result.stderr
    assert "Permission denied" in result.stderr
    assert box.ok("cat", "/etc/systemd/system/mdeploy@s.service.d/50-mdeploy.conf") == unit
    box.ready("s", after=before)
    assert box.ok("stat", "-c", "%U", f"{HOME}/services/s/state.json").strip() == "mdeploy"
    assert box.ask(8000) == 200


def test_an_interrupt_while_it_starts_takes_it_back(box: Box) -> None:
    before = _ours(box)
    box.write("/srv/loads", "")
    file = box.file(s={"env": {"FAKE_VLLM_LOADS": "/srv/loads"}})
    code = _INTERRUPTED.format(python=sys.executable, file=file)
    assert box.python(code).split()[-1] == "130"
    assert _ours(box) == before
    assert box.ps("s") is None
    box.ok("rm", "/srv/loads")


_INTERRUPTED = """
import pathlib, signal, subprocess, time
signal.signal(signal.SIGINT, signal.default_int_handler)
words = [{python!r}, "-m", "mdeploy", "install-systemd", "--file", {file!r}]
process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
for line in process.stderr:
    if "loading" in line.lower() or "starting the engine" in line:
        process.send_signal(signal.SIGINT)
        break
process.stderr.read()
print(process.wait(60))
"""


# keys


def test_a_key_file_that_goes_missing_stops_the_next_start(box: Box) -> None:
    _serve(box, KEY)
    assert box.mdeploy("install-systemd", "s").code == 0
    box.ok("mv", KEY_FILE, "/srv/kept")
    result = box.mdeploy("restart", "s")
    assert result.code == 78, result.stderr
    assert "cannot hand over its key file" in result.stderr
    box.ok("touch", KEY_FILE)
    result = box.mdeploy("restart", "s")
    assert result.code == 78
    assert "is empty" in result.stderr
    assert box.shows("s", "ActiveState") == "failed"
    assert box.shows("s", "NRestarts") == "0"
    assert (box.ps("s") or {})["phase"] == "failed"
    box.ok("mv", "/srv/kept", KEY_FILE)
    assert box.mdeploy("restart", "s").code == 0
    assert box.ask(8000, KEY) == 200


@pytest.mark.parametrize("damage", [("rm", KEY_FILE), ("cp", "/dev/null", KEY_FILE)])
def test_no_installation_without_its_key(box: Box, damage: tuple[str, ...]) -> None:
    before = _ours(box)
    _serve(box, KEY)
    box.ok(*damage)
    result = box.mdeploy("install-systemd", "s")
    assert result.code == 78
    assert f"the key file {KEY_FILE}" in result.stderr
    assert _ours(box) == before
    assert (box.ps("s") or {})["manager"] == "detached"


# who may, and where


def test_not_root_and_no_systemd(box: Box) -> None:
    _serve(box)
    refused = box.mdeploy("install-systemd", user="alice")
    assert refused.code == 1
    assert "sudo mdeploy install-systemd" in refused.stderr
    assert "--user" in refused.stderr
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/systemd && exec "$@"', "sh")
    for verb in (("install-systemd",), ("uninstall-systemd", "--all")):
        without = box.run(*hide, sys.executable, "-m", "mdeploy", *verb)
        assert without.code == 69
        assert "does not run systemd" in without.stderr
        assert "mdeploy serve llm -d" in without.stderr
    shown = box.run(*hide, sys.executable, "-m", "mdeploy", "install-systemd", "--dry-run")
    assert shown.code == 0, shown.stderr
    assert "# /etc/systemd/system/mdeploy@.service (0644)" in shown.stdout


def test_a_dry_run_shows_everything_and_does_nothing(box: Box) -> None:
    before = _ours(box)
    _serve(box, KEY)
    box.ok("chmod", "-R", "a+rX", f"{HOME}/services")
    result = box.mdeploy("install-systemd", "--dry-run", "--json", user="alice", MDEPLOY_HOME=HOME)
    assert result.code == 0, result.stderr
    assert [file["path"] for file in result.json["files"]] == [
        "/etc/sysusers.d/mdeploy.conf",
        "/etc/tmpfiles.d/mdeploy.conf",
        "/etc/systemd/system/mdeploy@.service",
        "/etc/systemd/system/mdeploy@s.service.d/50-mdeploy.conf",
    ]
    commands = result.json["commands"]
    assert commands[-3:] == [
        "systemctl daemon-reload",
        "systemctl enable mdeploy@s.service",
        "systemctl start mdeploy@s.service",
    ]
    assert KEY not in result.stdout
    assert _ours(box) == before


def test_as_another_user(box: Box) -> None:
    file = box.file(s={})
    assert box.mdeploy("install-systemd", "--file", file, "--as", "root").code == 2
    unknown = box.mdeploy("install-systemd", "--file", file, "--as", "nobody-knows-me")
    assert unknown.code == 78
    assert "there is no user nobody-knows-me" in unknown.stderr
    result = box.mdeploy("install-systemd", "--file", file, "--as", "bob", "--json")
    assert result.code == 0, result.stderr
    pid = result.json["services"][0]["pid"]
    assert box.ok("ps", "-o", "user=", "-p", str(pid)).strip() == "bob"
    box.ok("setpriv", "--reuid", "bob", "--clear-groups", "touch", "/dev/shm/of-bob")
    changed = box.mdeploy("install-systemd", "s", "--no-start", "--json")  # it runs already, so it is started anew
    assert changed.json["services"][0]["change"] == "updated", changed.stderr
    pid = changed.json["services"][0]["pid"]
    assert box.ok("ps", "-o", "user=", "-p", str(pid)).strip() == "mdeploy"
    box.ok("rm", "/dev/shm/of-bob")  # the service went, what else he has stayed


def test_nothing_is_known(box: Box) -> None:
    result = box.mdeploy("install-systemd")
    assert result.code == 3
    assert "mdeploy serve llm -d" in result.stderr
    assert box.mdeploy("install-systemd", "nobody").code == 3
    assert box.mdeploy("uninstall-systemd").code == 2


# several


def test_a_file_in_the_order_of_dependencies(box: Box) -> None:
    file = box.file(front={"depends_on": ["back"]}, back={}, broken={"env": {"FAKE_VLLM_MODE": "bad-config"}})
    result = box.mdeploy("install-systemd", "--file", file, "front", "--json", timeout=120)
    assert result.code == 0, result.stderr
    assert [service["name"] for service in result.json["services"]] == ["back", "front"]
    assert "mdeploy@back.service" in box.shows("front", "After")
    failed = box.mdeploy("install-systemd", "--file", file, timeout=120)
    assert failed.code == 78
    assert {s["name"]: s["phase"] for s in box.mdeploy("ps", "--json").json["services"]} == {
        "back": "ready",
        "front": "ready",
    }
    assert "installed before it: back; not begun: front" in failed.stderr
    assert not any("broken" in path for path in _ours(box))
    # the template alone knows no home and no user of its own: it must not run anything
    assert box.run("systemctl", "start", "mdeploy@broken").code != 0


def test_a_name_belongs_to_one_home(box: Box) -> None:
    box.install("s")
    home = "/srv/other-home"
    assert box.mdeploy("engines", "install", "vllm", "--python", f"{ENGINE}/bin/python", MDEPLOY_HOME=home).code == 0
    served = box.mdeploy("serve", "llm", MODEL, "--name", "s", "-d", "--port", "8030", MDEPLOY_HOME=home)
    assert served.code == 0, served.stderr
    result = box.mdeploy("install-systemd", "s", MDEPLOY_HOME=home)
    assert result.code == 78
    assert f"belongs to another home, {HOME}" in result.stderr
    assert box.mdeploy("uninstall-systemd", "s", MDEPLOY_HOME=home).code == 3
    both = box.mdeploy("ps", "--json", MDEPLOY_HOME=home).json["services"]
    assert [(s["name"], s["manager"]) for s in both] == [("s", "detached"), ("s", "systemd")]
    assert box.mdeploy("stop", "s", MDEPLOY_HOME=home).code == 0
    box.ok("rm", "-r", "/srv/other-home")


def test_serving_again_with_a_key_brings_the_unit_up_to_date(box: Box) -> None:
    box.install("s")
    assert box.mdeploy("stop", "s").code == 0
    served = box.mdeploy("serve", "llm", MODEL, "--name", "s", "-d", "--json", MDEPLOY_API_KEY=KEY)
    assert served.code == 0, served.stderr
    assert served.json["service"]["manager"] == "systemd"
    assert box.ask(served.json["service"]["port"], KEY) == 200
    assert box.ask(served.json["service"]["port"]) == 401
    running = box.mdeploy("serve", "llm", MODEL, "--name", "s", "-d")
    assert running.code == 1
    assert "already running" in running.stderr
    assert box.mdeploy("stop", "s").code == 0
    beside = box.mdeploy("run", "s")
    assert beside.code == 78
    assert "mdeploy restart s" in beside.stderr
