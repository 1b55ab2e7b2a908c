from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest

from tests.fakes import hub
from tests.support import free_port, mdeploy, running, until


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.make_model(tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_told_to_stop(models: Path, tmp_path: Path, number: signal.Signals) -> None:
    with running("mirror", models, "--port", "0") as process:
        assert process.stderr is not None
        said = ""
        while "modelscope download" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        found = re.search(r"MODELSCOPE_ENDPOINT=(http://127\.0\.0\.1:\d+) mdeploy download (\S+)", said)
        assert found, said
        assert re.search(rf"{hub.MODEL} +master +7 +2\.9 MiB", said)
        assert "only this machine" in said
        result = mdeploy("download", found[2], MODELSCOPE_ENDPOINT=found[1])
        assert result.code == 0, result.stderr
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "")
    assert stderr == "mirror stopped\n"


def test_says_who_can_reach_it(models: Path) -> None:
    with running("mirror", models, "--host", "0.0.0.0", "--port", "0") as process:
        assert process.stderr is not None
        lines: list[str] = []
        until(lambda: lines.append(process.stderr.readline()) or "modelscope download" in lines[-1])  # type: ignore
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert "anyone who can reach port" in "".join(lines)


def test_port_in_use(models: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = mdeploy("mirror", models, "--port", str(port))
    assert result.code == 78
    assert f"port {port} on 127.0.0.1 is in use" in result.stderr
    assert f"--port {port + 1}" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["none"], 3, "/none"),
        (["."], 3, "no complete model"),
        (["models", "--port", "70000"], 2, "--port"),
        (["models", "--host", "192.0.2.1"], 78, "cannot listen"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_input(models: Path, args: list[str], code: int, words: str) -> None:
    if args == ["."]:
        (models / hub.MODEL / "config.json.incomplete").touch()
    result = mdeploy("mirror", *args, *(["--port", str(free_port())] if len(args) == 1 else []))
    assert (result.code, result.stdout) == (code, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr
