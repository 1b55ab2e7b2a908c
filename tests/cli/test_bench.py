from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mdeploy.errors import ExitCode
from tests.bench.mocks import mock, truth
from tests.support import Result, mdeploy, processes_with, running, until

SMALL = ("-c", "2", "--input-tokens", "32", "--output-tokens", "4")
NOBODY = "http://127.0.0.1:1"


def bench(*args: str | Path, key: str = "") -> Result:
    return mdeploy("bench", *args, MDEPLOY_API_KEY=key)


def check_code(result: Result, document: dict[str, object]) -> None:
    """Whether this busy machine gave a valid run is its affair; that the status says so is ours."""
    audit = document["audit"]
    assert isinstance(audit, dict)
    assert result.code == (ExitCode.OK if audit["valid"] else ExitCode.INVALID), result.stderr


def test_json_is_one_document_on_stdout() -> None:
    with mock() as url:
        result = bench(f"{url}/v1", "-n", "12", *SMALL, "--json")
    assert result.json["schema"] == 1
    assert result.json["requests"] == {"completed": 12, "failed": 0, "cancelled": 0, "by_error": {}}
    assert result.json["tokens"]["output_total"] == 48
    check_code(result, result.json)


def test_plain_output_for_people(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with mock() as url:
        result = bench(url, "-n", "12", *SMALL, "-o", file)
    assert "12 completed, 0 failed" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[0].startswith("measuring http://127.0.0.1:")
    document = json.loads(file.read_text())
    assert document["requests"]["completed"] == 12
    assert [path.name for path in tmp_path.iterdir() if "result" in path.name] == ["result.json"]
    check_code(result, document)


def test_host_and_port_without_a_scheme() -> None:
    with mock() as url:
        result = bench(url.removeprefix("http://"), "-n", "2", *SMALL, "--json")
    assert result.json["requests"]["completed"] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        ["-c", "0"],
        ["-c", "-1"],
        ["-c", "many"],
        ["-n", "0"],
        ["-d", "-1"],
        ["-d", "1", "-n", "1"],
        ["--endpoint", "images"],
        ["--input-tokens", "0"],
        ["--workers", "0"],
        ["--timeout", "0"],
    ],
)
def test_bad_values_are_usage_errors(wrong: list[str]) -> None:
    assert bench(NOBODY, *wrong).code == ExitCode.USAGE


def test_nobody_there_is_unavailable() -> None:
    result = bench(NOBODY, "--json")
    assert result.code == ExitCode.UNAVAILABLE
    assert result.json["error"]["code"] == "unavailable"


def test_no_service_is_not_found() -> None:
    assert bench().code == ExitCode.NOT_FOUND
    assert bench("no-such-service").code == ExitCode.NOT_FOUND


def test_a_file_that_cannot_be_written_is_found_before_the_load(tmp_path: Path) -> None:
    with mock() as url:
        assert bench(url, "-o", tmp_path / "no" / "file").code == ExitCode.CONFIG
        assert bench(url, "-o", tmp_path).code == ExitCode.USAGE
        assert truth(url) == []


def test_the_key_comes_from_the_environment_and_shows_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "out"
    with mock("--api-key", "sk-secret") as url:
        denied = bench(url, "-n", "2", *SMALL)
        allowed = bench(url, "-n", "2", *SMALL, "--json", "-o", file, key="sk-secret")
    assert denied.code == ExitCode.CONFIG
    assert "MDEPLOY_API_KEY" in denied.stderr
    assert allowed.json["requests"]["completed"] == 2
    assert "sk-secret" not in allowed.stdout + allowed.stderr + file.read_text()


@pytest.mark.parametrize(("rate", "failed"), [("0.5", 4), ("1.0", 8)])
def test_failures_are_shown_and_end_in_status_six(rate: str, failed: int) -> None:
    with mock("--fault", "503", "--fault-after", "1", "--fault-rate", rate) as url:
        result = bench(url, "-n", "8", *SMALL)
    assert result.code == ExitCode.INVALID
    assert f"{failed} x http_503" in result.stdout
    assert "INVALID" in result.stdout
    assert "invalid: " in result.stderr


def test_an_interrupt_shows_what_there_is() -> None:
    marked = "MDEPLOY_TEST_MARK=interrupt"
    args = ("bench", "-d", "600", *SMALL, "--json")
    with mock() as url, running(*args, url, MDEPLOY_TEST_MARK="interrupt") as process:
        until(lambda: len(truth(url)) >= 10)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == ExitCode.INTERRUPTED, stderr
        document = json.loads(stdout)
        assert document["interrupted"]
        assert document["requests"]["completed"] >= 10
        assert document["requests"]["failed"] == 0
        until(lambda: not processes_with(marked), what="workers gone")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(how: signal.Signals) -> None:
    mark = f"MDEPLOY_TEST_MARK={how.name}"
    with (
        mock() as url,
        running("bench", url, "-d", "600", "--workers", "2", *SMALL, MDEPLOY_TEST_MARK=how.name) as process,
    ):
        until(lambda: len(truth(url)) >= 10)
        assert len(processes_with(mark)) == 3
        process.send_signal(how)
        process.wait(timeout=60)
        until(lambda: not processes_with(mark), what="workers gone")


def test_a_worker_that_is_killed_is_an_error() -> None:
    mark = "MDEPLOY_TEST_MARK=worker"
    with mock() as url, running("bench", url, "-d", "600", *SMALL, MDEPLOY_TEST_MARK="worker") as process:
        until(lambda: len(truth(url)) >= 10)
        (worker,) = set(processes_with(mark)) - {process.pid}
        os.kill(worker, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == ExitCode.FAILURE
        assert "a load worker died" in stderr


def test_a_server_that_goes_away_is_counted() -> None:
    with ExitStack() as server:
        url = server.enter_context(mock())
        with running("bench", url, "-d", "3", *SMALL, "--json") as process:
            until(lambda: len(truth(url)) >= 10)
            server.close()
            stdout, stderr = process.communicate(timeout=60)
    requests = json.loads(stdout)["requests"]
    assert requests["completed"] >= 10, stderr
    assert requests["by_error"]["connection_refused"] >= 1


def test_on_a_terminal_progress_is_drawn_on_stderr_only() -> None:
    with mock() as url:
        outer, inner = pty.openpty()
        command = [sys.executable, "-m", "mdeploy", "bench", url, "-n", "40", *SMALL]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inner, text=True) as process:
            os.close(inner)
            stdout = process.communicate(timeout=60)[0]
        drawn = b""
        try:
            while piece := os.read(outer, 4096):
                drawn += piece
        except OSError:
            pass  # Linux says EIO when the other end is closed
        os.close(outer)
    assert b"measuring" in drawn
    assert "\x1b" not in stdout
