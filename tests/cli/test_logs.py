"""`mdeploy logs` as a user types it, on a service with a stand-in engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import free_port, mdeploy, ps, tiny_model, until

pytestmark = pytest.mark.usefixtures("fake_engine")

STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


@pytest.fixture
def log(home: Path, tmp_path: Path) -> Path:
    """The log of a service `s` that is ready."""
    model = tiny_model(tmp_path / "org" / "tiny")
    served = mdeploy("serve", "llm", model, "--name", "s", "-d", "--port", str(free_port()))
    assert served.code == 0, served.stderr
    return home / "services/s/log"


@contextmanager
def _following(*args: str) -> Iterator[subprocess.Popen[str]]:
    """A follower; its output comes unbuffered, and it is gone at the end."""
    command = [sys.executable, "-m", "mdeploy", "logs", "s", "-f", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _state(log: Path) -> dict[str, Any]:
    return dict(json.loads((log.parent / "state.json").read_text()))


def test_lines_are_shown_as_the_engine_wrote_them_or_with_their_times(log: Path) -> None:
    plain = mdeploy("logs", "s").stdout.splitlines()
    timed = mdeploy("logs", "s", "-t").stdout.splitlines()
    assert plain[-1].endswith("Application startup complete.")
    assert not any(STAMP.match(line) for line in plain)
    assert [STAMP.sub("", line) for line in timed] == plain
    assert all(STAMP.match(line) for line in timed)
    assert mdeploy("logs", "s", "-n", "1").stdout.splitlines() == plain[-1:]
    assert mdeploy("logs", "s", "-n", "0").stdout == ""


def test_since_and_grep(log: Path) -> None:
    log.with_name("log.1").write_text("2020-01-01T00:00:00.000Z ages ago\n")
    everything = mdeploy("logs", "s").stdout
    assert everything.startswith("ages ago\n")
    assert mdeploy("logs", "s", "--since", "1h").stdout == everything.removeprefix("ages ago\n")
    assert mdeploy("logs", "s", "--grep", "^ages").stdout == "ages ago\n"
    assert mdeploy("logs", "s", "--grep", "^ages", "--since", "1h").stdout == ""
    assert mdeploy("logs", "s", "--grep", "a", "-n", "1").stdout == everything.splitlines()[-1] + "\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--since", "soon"), "is no time"),
        (("--since", "9999-01-01"), "lies in the future"),
        (("--grep", "(unclosed"), "is no regular expression"),
        (("-n", "-1"), "Invalid value"),
    ],
)
def test_nonsense_is_a_usage_error(log: Path, args: tuple[str, ...], says: str) -> None:
    result = mdeploy("logs", "s", *args)
    assert (result.code, result.stdout) == (2, "")
    assert says in result.stderr


def test_follow_goes_on_across_rotation_and_truncation_and_ends_with_the_service(log: Path) -> None:
    with _following("-n", "1", "--grep", "startup|by hand|EngineCore died") as process:
        assert _line(process).endswith("Application startup complete.\n")
        log.rename(log.with_name("log.1"))
        log.write_text("2026-01-01T00:00:00.000Z by hand\nignored\n")
        assert _line(process) == "by hand\n"
        os.truncate(log, 0)
        with log.open("a") as file:
            file.write("by hand, 2\n")
        assert _line(process) == "by hand, 2\n"
        assert mdeploy("stop", "s").code == 0
        assert process.wait(30) == 0


def test_ctrl_c_leaves_a_follower_quietly(log: Path) -> None:
    with _following("-n", "1") as process:
        assert _line(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert (ps("s") or {})["phase"] == "ready"


def test_the_log_goes_on_when_somebody_removes_it(log: Path) -> None:
    log.unlink()
    os.kill(_state(log)["engine_pid"], signal.SIGKILL)
    until(lambda: log.exists() and "mdeploy: " in log.read_text(), what="the supervisor tells of the death")
    assert log.stat().st_mode & 0o777 == 0o600
    assert "mdeploy: " in mdeploy("logs", "s").stdout
