"""Logs and keys of services that a real systemd runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support import free_port, until
from tests.systemd.box import HOME, MODEL, Box

STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


@pytest.fixture
def port(box: Box) -> int:
    """The port of a service `s` that is installed and ready."""
    number = free_port()
    served = box.mdeploy("serve", "llm", MODEL, "--name", "s", "-d", "--port", str(number))
    assert served.code == 0, served.stderr
    installed = box.mdeploy("install-systemd", "s")
    assert installed.code == 0, installed.stderr
    return number


def _follow(box: Box, *words: str) -> subprocess.Popen[str]:
    command = box.command(sys.executable, "-m", "mdeploy", "logs", "s", "-f", *words)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def test_logs_come_from_the_journal(box: Box, port: int) -> None:
    plain = box.mdeploy("logs", "s").stdout.splitlines()
    assert any(line.endswith("Application startup complete.") for line in plain)
    assert any(line.startswith("systemd: Started") for line in plain)
    timed = box.mdeploy("logs", "s", "-t").stdout.splitlines()
    assert [STAMP.sub("", line) for line in timed] == plain
    assert all(STAMP.match(line) for line in timed)
    assert box.mdeploy("logs", "s", "-n", "1").stdout.splitlines() == plain[-1:]
    found = box.mdeploy("logs", "s", "--grep", "startup comp[l]ete", "-n", "1", "--since", "1h").stdout
    assert found.endswith("Application startup complete.\n")
    assert found.count("\n") == 1


def test_following_shows_what_comes_and_ends_with_the_unit(box: Box, port: int) -> None:
    run = box.state("s")["run_id"]
    with _follow(box, "-n", "1", "--grep", "startup complete|EngineCore died") as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline().endswith("Application startup complete.\n")
        core = max(box.processes(run))
        box.ok("kill", "-9", str(core))
        assert follower.stdout.readline().endswith("EngineCore died\n")
        assert follower.stdout.readline().endswith("Application startup complete.\n")
        assert box.mdeploy("stop", "s").code == 0
        assert follower.wait(30) == 0


def test_an_ordinary_user_is_told_what_is_not_for_him(box: Box, port: int) -> None:
    assert box.mdeploy("keys", "add", "s").code == 0
    result = box.mdeploy("logs", "s", user="alice", MDEPLOY_HOME=HOME)
    assert result.stdout == ""
    assert "sudo" in result.stderr
    for words in (("ls",), ("rotate", "s")):
        keys = box.mdeploy("keys", *words, user="alice", MDEPLOY_HOME=HOME)
        assert keys.code != 0
        assert "sudo" in keys.stderr, keys.stderr


def test_keys_of_a_unit(box: Box, port: int) -> None:
    assert box.ask(port) == 200
    added = box.mdeploy("keys", "add", "s")
    assert added.code == 0, added.stderr
    first = added.stdout.strip()
    assert (box.ask(port), box.ask(port, first)) == (401, 200)
    rotated = box.mdeploy("keys", "rotate", "s")
    assert rotated.code == 0, rotated.stderr
    second = rotated.stdout.strip()
    assert (box.ask(port, first), box.ask(port, second)) == (401, 200)
    assert second not in box.ok("systemctl", "cat", "mdeploy@s") + box.mdeploy("logs", "s").stdout
    assert box.mdeploy("keys", "rm", "s").code == 0
    assert box.ask(port) == 200


def test_systemd_starts_a_stopped_unit_with_the_keys_it_has_by_now(box: Box, port: int) -> None:
    """As a boot does: nobody asks mdeploy before."""
    for words, served, open_to_all in (
        (("keys", "add", "s"), "", False),
        (("keys", "rm", "s"), "", True),
        (("serve", "llm", MODEL, "--name", "s", "--port", str(port)), "sk-served", False),
    ):
        run = box.state("s")["run_id"]
        assert box.mdeploy("stop", "s").code == 0
        changed = box.mdeploy(*words, MDEPLOY_API_KEY=served)
        assert "systemd runs it" in changed.stderr if served else changed.code == 0, changed.stderr
        box.ok("systemctl", "start", "mdeploy@s")
        box.ready("s", after=run)
        key = served or changed.stdout.strip()
        assert (box.ask(port), box.ask(port, key)) == (200 if open_to_all else 401, 200)


def test_an_interrupted_rotation_of_a_unit_goes_on_with_the_old_key(box: Box, port: int) -> None:
    old = box.mdeploy("keys", "add", "s").stdout.strip()
    loads = f"{HOME}/services/s/loads"
    box.engine_env("s", FAKE_VLLM_LOADS=loads)
    box.ok("touch", loads)
    before = box.state("s")["run_id"]
    rotate = box.command("sh", "-c", 'echo $$; exec "$@"', "sh", sys.executable, "-m", "mdeploy", "keys", "rotate", "s")
    with subprocess.Popen(
        rotate, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        until(lambda: box.state("s")["run_id"] not in ("", before), what="it is started with the new key")
        box.ok("kill", "-INT", pid)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "s: the change is taken back, it goes on with its old key" in said
    box.ok("rm", loads)
    box.ready("s", after=before)
    assert (box.ask(port), box.ask(port, old)) == (401, 200)


def test_a_key_of_a_unit_that_does_not_start_with_it(box: Box, port: int) -> None:
    old = box.mdeploy("keys", "add", "s").stdout.strip()
    box.write(
        "/etc/systemd/system/mdeploy@s.service.d/95-key.conf", "[Service]\nEnvironment=FAKE_VLLM_MODE=bad-config\n"
    )
    try:
        result = box.mdeploy("keys", "rotate", "s")
        assert result.code != 0
        assert "does not start with that either" in result.stderr
    finally:
        box.ok("rm", "/etc/systemd/system/mdeploy@s.service.d/95-key.conf")
        box.ok("systemctl", "daemon-reload")
    assert box.mdeploy("restart", "s").code == 0
    assert box.ask(port, old) == 200
