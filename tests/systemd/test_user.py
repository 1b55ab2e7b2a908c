"""Units of one's own account: no root, no sandbox, and they outlive the login."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import until
from tests.systemd.box import ENGINE, MODEL, Box


@pytest.fixture
def alice(box: Box) -> Iterator[Box]:
    """An ordinary user who lingers and has the stand-in engine; nothing of her services stays."""
    with box.open_root():
        box.ok("loginctl", "enable-linger", "alice")
        socket = f"/run/user/{box.ok('id', '-u', 'alice').strip()}/systemd/private"
        until(lambda: box.run("test", "-S", socket).code == 0, what="her systemd runs")
        result = box.mdeploy("engines", "install", "vllm", "--python", f"{ENGINE}/bin/python", user="alice")
        assert result.code == 0, result.stderr
        path = "/home/alice/.config/systemd/user/mdeploy@.service.d/90-test.conf"
        box.write(path, "[Service]\nRestartSec=200ms\n")
        box.ok("chown", "-R", "alice:", "/home/alice/.config")
        yield box
        result = box.mdeploy("uninstall-systemd", "--all", "--user", user="alice")
        assert result.code == 0, result.stderr
        box.ok("loginctl", "disable-linger", "alice")
        box.ok("rm", "-rf", "/home/alice/.local", "/home/alice/.config")


def test_a_user_unit_from_install_to_uninstall(alice: Box) -> None:
    served = alice.mdeploy("serve", "llm", MODEL, "--name", "u", "--port", "8020", "-d", user="alice")
    assert served.code == 0, served.stderr
    result = alice.mdeploy("install-systemd", "u", "--user", "--json", user="alice")
    assert result.code == 0, result.stdout + result.stderr
    assert result.json["services"][0]["change"] == "installed"
    assert alice.ask(8020) == 200
    seen = alice.ps("u", user="alice") or {}
    assert (seen["phase"], seen["manager"]) == ("ready", "systemd")
    assert alice.ok("ps", "-o", "user=", "-p", str(seen["pid"])).strip() == "alice"
    again = alice.mdeploy("install-systemd", "u", "--user", "--json", user="alice")
    assert again.json["services"][0]["change"] == "unchanged"
    alice.ok("kill", "-9", str(seen["pid"]))
    until(lambda: (s := alice.ps("u", user="alice")) and s["phase"] == "ready" and s["pid"] != seen["pid"], 40)
    assert alice.mdeploy("stop", "u", user="alice").code == 0
    assert alice.mdeploy("restart", "u", user="alice").code == 0
    alice.ok("loginctl", "terminate-user", "alice")
    alice.reboot()
    until(lambda: (s := alice.ps("u", user="alice")) and s["phase"] == "ready", 40, "it is back after a boot")
    assert alice.ask(8020) == 200
    gone = alice.mdeploy("uninstall-systemd", "u", "--user", user="alice")
    assert gone.code == 0, gone.stderr
    left = alice.run("find", "/home/alice/.config", "-name", "*mdeploy*").stdout.split()
    assert left == ["/home/alice/.config/systemd/user/mdeploy@.service.d"]  # the tests' own


def test_without_a_manager_of_ones_own(box: Box) -> None:
    """No login, no lingering, no polkit to allow it: says what root has to do."""
    with box.open_root():
        box.mdeploy("engines", "install", "vllm", "--python", f"{ENGINE}/bin/python", user="alice")
        served = box.mdeploy("serve", "llm", MODEL, "--name", "u", "--port", "8020", "-d", user="alice")
        assert served.code == 0, served.stderr
        result = box.mdeploy("install-systemd", "u", "--user", user="alice")
        assert box.mdeploy("stop", "u", user="alice").code == 0
    assert result.code == 69
    assert "loginctl enable-linger alice" in result.stderr
    assert box.run("find", "/home/alice/.config", "-name", "*mdeploy*").stdout == ""
    box.ok("rm", "-rf", "/home/alice/.local", "/home/alice/.config")
