from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mdeploy.hub import store
from mdeploy.specs import ModelRef
from tests.fakes import hub
from tests.support import Result, mdeploy, running, until

REF = ModelRef(hub.MODEL)
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def hub_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("models")
    hub.make_model(root)
    hub.make_model(root, "demo/one", {"config.json": b"{}"})
    with hub.mirror(root) as url:
        yield url


@pytest.fixture(autouse=True)
def surroundings(hub_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub, a HOME of its own, and an SDK that gives a file two tries."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub_url)
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "1")


@pytest.fixture
def cache() -> Path:
    return Path(os.environ["MODELSCOPE_CACHE"])


def download(*args: str | Path) -> Result:
    return mdeploy("download", *args)


def missing(cache: Path) -> int:
    """Bytes that have not arrived."""
    return hub.TOTAL - sum(map(len, hub.contents(store.snapshot_dir(REF, cache)).values()))


def test_prints_the_directory_and_nothing_else(cache: Path) -> None:
    result = download(hub.MODEL)
    assert result.code == 0, result.stderr
    assert result.stdout == f"{store.snapshot_dir(REF, cache)}\n"
    assert hub.contents(Path(result.stdout.strip())) == hub.FILES
    lines = result.stderr.splitlines()
    assert lines[0] == "7 files, 2.9 MiB"
    assert lines[1].startswith("demo/tiny-1.5 (commit ")
    assert len(lines) == 2


def test_json_contract(cache: Path) -> None:
    keys = {"schema", "model", "revision", "commit", "path", "files", "bytes", "fetched_bytes", "seconds"}
    first = download(hub.MODEL, "--json").json
    assert set(first) == keys
    assert first["schema"] == 1
    assert (first["model"], first["revision"]) == (hub.MODEL, "master")
    assert (first["files"], first["bytes"], first["fetched_bytes"]) == (len(hub.FILES), hub.TOTAL, hub.TOTAL)
    second = download(hub.MODEL, "--json").json
    assert second["fetched_bytes"] == 0
    assert second["commit"] == first["commit"]


def test_where_it_goes(tmp_path: Path, cache: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert download("demo/one", "--cache-dir", elsewhere).stdout.startswith(f"{elsewhere}/models/demo--one/")
    assert download("demo/one", "--local-dir", "here").stdout == f"{tmp_path / 'here'}\n"
    assert not (cache / "models").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nope"], 2, "owner/name"),
        (["../x/y"], 2, "path"),
        (["a/b/c"], 2, "two parts"),
        (["demo/one@../../x"], 2, "revision"),
        (["demo/one", "--revision", ".."], 2, "revision"),
        (["demo/one", "--endpoint", "ftp://x"], 2, "hub address"),
        ([], 2, "Missing argument"),
        (["demo/none"], 3, "no model demo/none"),
        (["demo/one", "--revision", "main"], 3, "master"),
        (["demo/one", "--endpoint", NOBODY], 69, "refused"),
        (["demo/one", "--endpoint", "http://no.such.host.invalid"], 69, "no.such.host.invalid"),
        (["demo/one", "--cache-dir", "/proc/none"], 78, "/proc/none"),
        (["demo/one", "--local-dir", __file__], 78, "test_download.py"),
    ],
)
def test_wrong_input(args: list[str], code: int, words: str, tmp_path: Path, cache: Path) -> None:
    result = download(*args)
    assert (result.code, result.stdout) == (code, ""), result.stderr
    assert words in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name not in (".modelscope", "home")] == []


def test_errors_as_json() -> None:
    result = download("demo/none", "--json")
    assert result.code == 3
    assert set(result.json["error"]) == {"code", "message", "hint"}
    assert result.json["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("fault", "on", "code", "words"),
    [
        ("status=401", "", 78, "MODELSCOPE_API_TOKEN"),
        ("status=401", "FilePath", 78, "MODELSCOPE_API_TOKEN"),
        ("status=403", "FilePath", 78, "MODELSCOPE_API_TOKEN"),
        ("status=503", "", 69, "503"),
        ("status=503", "FilePath", 69, "did not arrive"),
        ("status=404", "FilePath", 1, "does not have it"),
        ("html", "/repo/files", 69, "no ModelScope hub"),
        ("null", "/repo/files", 3, "empty"),
        ("corrupt", "FilePath", 1, "other bytes"),
        ("short", "FilePath", 1, "other bytes"),
        ("evil=../../../evil", "/repo/files", 1, "not inside the model"),
    ],
)
def test_a_broken_hub_leaves_nothing(
    hub_url: str, cache: Path, tmp_path: Path, fault: str, on: str, code: int, words: str
) -> None:
    with hub.front(hub_url, fault, on) as front:
        result = download("demo/one", "--endpoint", front.url)
    assert (result.code, result.stdout) == (code, ""), result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not cache.exists()
    assert not (tmp_path / "evil").exists()


def test_one_missing_file_is_no_whole_model(hub_url: str, cache: Path) -> None:
    with hub.front(hub_url, "status=404", on=hub.BIG) as front:
        assert download(hub.MODEL, "--endpoint", front.url).code == 1
    assert (store.snapshot_dir(REF, cache) / "config.json").exists()
    assert store.locate(REF, cache) is None
    assert download(hub.MODEL, "--json").json["fetched_bytes"] == hub.BIG_BYTES
    assert store.locate(REF, cache) is not None


def test_a_cut_is_resumed(hub_url: str, cache: Path) -> None:
    with hub.front(hub_url, "drop=1000000", on=hub.BIG, times=1) as front:
        result = download(hub.MODEL, "--endpoint", front.url, "--json")
        assert front.asked(hub.BIG) == 2
        assert front.log()[-1]["headers"].get("Range") in (None, "bytes=1000000-")
    assert result.json["fetched_bytes"] == hub.TOTAL
    assert hub.contents(store.snapshot_dir(REF, cache)) == hub.FILES


def test_a_line_that_keeps_breaking_gets_there(hub_url: str, cache: Path) -> None:
    with hub.front(hub_url, "drop=300000", on=hub.BIG) as front:
        result = download(hub.MODEL, "--endpoint", front.url)
        assert result.code == 0, result.stderr
        assert front.asked(hub.BIG) >= 10
    assert hub.contents(store.snapshot_dir(REF, cache)) == hub.FILES


def test_a_hub_that_dies_and_comes_back(hub_url: str, cache: Path) -> None:
    with hub.front(hub_url, "stall=500000", on=hub.BIG) as front:
        with running("download", hub.MODEL, "--endpoint", front.url) as process:
            partial = store.partial_path(store.snapshot_dir(REF, cache), hub.BIG)
            until(lambda: partial.exists() and partial.stat().st_size == 500_000)
            front.process.kill()
            stderr = process.communicate(timeout=60)[1]
        assert process.returncode == 69, stderr
    assert store.locate(REF, cache) is None
    left = missing(cache)
    assert left < hub.TOTAL
    assert download(hub.MODEL, "--json").json["fetched_bytes"] == left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_then_resumed(hub_url: str, cache: Path, number: signal.Signals) -> None:
    partial = store.partial_path(store.snapshot_dir(REF, cache), hub.BIG)
    with ExitStack() as stack:
        front = stack.enter_context(hub.front(hub_url, "stall=500000", on=hub.BIG))
        process = stack.enter_context(running("download", hub.MODEL, "--endpoint", front.url))
        until(lambda: partial.exists() and partial.stat().st_size == 500_000)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode in (130, 128 + number), stdout) == (True, "")
    assert "Traceback" not in stderr
    assert "goes on from there" in stderr
    assert store.locate(REF, cache) is None
    left = missing(cache)
    assert hub.BIG_BYTES - 500_000 <= left < hub.TOTAL
    assert download(hub.MODEL, "--json").json["fetched_bytes"] == left
    assert hub.contents(store.snapshot_dir(REF, cache)) == hub.FILES


@pytest.mark.parametrize("where", ["/repo/files", "FilePath"])
def test_interrupted_before_the_first_byte(hub_url: str, cache: Path, where: str) -> None:
    with hub.front(hub_url, "hang", on=where) as front:
        with running("download", "demo/one", "--endpoint", front.url) as process:
            until(lambda: front.asked(where))
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        assert process.returncode == 130
    assert not cache.exists()


def test_killed_then_resumed(hub_url: str, cache: Path) -> None:
    partial = store.partial_path(store.snapshot_dir(REF, cache), hub.BIG)
    with ExitStack() as stack:
        front = stack.enter_context(hub.front(hub_url, "stall=500000", on=hub.BIG))
        process = stack.enter_context(running("download", hub.MODEL, "--endpoint", front.url))
        until(lambda: partial.exists() and partial.stat().st_size == 500_000)
        process.kill()
        process.communicate()
    assert store.locate(REF, cache) is None
    assert download(hub.MODEL).code == 0
    assert hub.contents(store.snapshot_dir(REF, cache)) == hub.FILES


def test_two_at_once_fetch_once(hub_url: str, cache: Path) -> None:
    with hub.front(hub_url, "html", times=0) as front, ExitStack() as stack:
        command = ("download", hub.MODEL, "--json", "--endpoint", front.url)
        processes = [stack.enter_context(running(*command)) for _ in range(2)]
        outputs = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert front.asked("FilePath") == len(hub.FILES)
    assert sum(json.loads(stdout)["fetched_bytes"] for stdout, _ in outputs) == hub.TOTAL
    assert hub.contents(store.snapshot_dir(REF, cache)) == hub.FILES


def test_a_directory_where_a_file_belongs(cache: Path) -> None:
    (store.snapshot_dir(REF, cache) / "config.json").mkdir(parents=True)
    result = download(hub.MODEL)
    assert result.code == 78, result.stderr
    assert "config.json" in result.stderr


def test_a_file_where_a_directory_belongs(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "demo--tiny-1.5").touch()
    result = download(hub.MODEL)
    assert result.code == 78, result.stderr
    assert "demo--tiny-1.5" in result.stderr
    assert [p.name for p in cache.rglob("*")] == ["models", "demo--tiny-1.5"]


_SMALL_DISK = """
mkdir -p "$MODELSCOPE_CACHE" && mount -t tmpfs -o size={size} tmpfs "$MODELSCOPE_CACHE" || exit 99
{before}
{python} -m mdeploy download {model}; code=$?
find "$MODELSCOPE_CACHE" -type f -not -name '*.lock' | sort
exit $code
"""


def small_disk(size: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Download in a mount namespace whose cache is a tiny tmpfs, or which `before` makes read-only."""
    script = _SMALL_DISK.format(size=size, before=before, python=sys.executable, model=hub.MODEL)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare:" in done.stderr or done.returncode == 99:
        pytest.skip("no mount namespaces here")
    return done


def test_too_small_a_disk() -> None:
    done = small_disk("1m")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "not enough room" in done.stderr


def test_a_disk_that_fills_up() -> None:
    """Sparse on paper, so the check in advance passes: the quota of inodes ends first."""
    done = small_disk("8m,nr_inodes=14")
    assert done.returncode == 1, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_read_only_cache() -> None:
    done = small_disk("8m", before='mount -o remount,ro "$MODELSCOPE_CACHE" || exit 99')
    assert (done.returncode, done.stdout) == (78, ""), done.stderr
    assert "Read-only file system" in done.stderr


def test_a_terminal_gets_a_bar(hub_url: str) -> None:
    ours, theirs = pty.openpty()
    with hub.front(hub_url, "stall=500000", on=hub.BIG) as front:
        command = [sys.executable, "-m", "mdeploy", "download", hub.MODEL, "--endpoint", front.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as p:
            os.close(theirs)
            drawn = b""
            while b"/3.0" not in drawn and b"/2.9" not in drawn:
                drawn += os.read(ours, 4096)
            p.send_signal(signal.SIGINT)
            assert p.communicate(timeout=30)[0] == b""
    os.close(ours)
