from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mdeploy.errors import NotFoundError, UnavailableError
from mdeploy.hub import client, listing, sdk, store
from mdeploy.specs import LocalModel, ModelRef
from tests.fakes import hub
from tests.support import REPO

REF = ModelRef(hub.MODEL)


class Watcher:
    """A progress that adds up, from whatever thread."""

    def __init__(self) -> None:
        self.begun: tuple[int, int, int] | None = None
        self.done = 0
        self.ended = 0
        self._lock = threading.Lock()

    def begin(self, files: int, total: int, done: int) -> None:
        self.begun = (files, total, done)
        self.done = done

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch(url: str, cache: Path, ref: ModelRef = REF, local_dir: Path | None = None) -> tuple[LocalModel, Watcher]:
    watcher = Watcher()
    found = client.download(ref, cache_dir=cache, local_dir=local_dir, endpoint=url, progress=watcher)
    assert watcher.done == hub.TOTAL
    assert watcher.ended == 1
    return found, watcher


def test_byte_for_byte_then_nothing(hub_url: str, cache: Path) -> None:
    first, watcher = fetch(hub_url, cache)
    assert hub.contents(Path(first.path)) == hub.FILES
    assert Path(first.path) == cache / "models" / "demo--tiny-1.5" / "snapshots" / "master"
    assert (first.files, first.bytes, first.fetched_bytes) == (len(hub.FILES), hub.TOTAL, hub.TOTAL)
    assert watcher.begun == (len(hub.FILES), hub.TOTAL, 0)
    assert first.commit and len(first.commit) == 40
    assert first.seconds > 0
    again, watcher = fetch(hub_url, cache)
    assert again.fetched_bytes == 0
    assert watcher.begun == (len(hub.FILES), hub.TOTAL, hub.TOTAL)
    assert store.locate(REF, cache) == Path(first.path)


def test_second_download_asks_for_no_file(hub_url: str, cache: Path) -> None:
    fetch(hub_url, cache)
    with hub.front(hub_url, "html", times=0) as front:
        fetch(front.url, cache)
        assert front.asked("FilePath") == 0


def test_local_dir(hub_url: str, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "here"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "mine").write_text("kept")
    found, _ = fetch(hub_url, cache, local_dir=target)
    assert found.path == str(target)
    assert hub.contents(target) == {**hub.FILES, "sub/mine": b"kept"}
    assert not (cache / "models").exists()


def test_a_commit_is_a_revision(hub_url: str, cache: Path) -> None:
    commit = fetch(hub_url, cache)[0].commit
    assert commit
    pinned, _ = fetch(hub_url, cache, ModelRef(hub.MODEL, commit))
    assert pinned.commit == commit
    assert Path(pinned.path).name == commit


def test_partial_bytes_are_used(hub_url: str, cache: Path) -> None:
    target = store.snapshot_dir(REF, cache)
    target.mkdir(parents=True)
    store.partial_path(target, hub.BIG).write_bytes(hub.FILES[hub.BIG][:1_000_000])
    found, watcher = fetch(hub_url, cache)
    assert watcher.begun == (len(hub.FILES), hub.TOTAL, 1_000_000)
    assert found.fetched_bytes == hub.TOTAL - 1_000_000
    assert hub.contents(target) == hub.FILES


def test_a_hub_that_ignores_ranges(hub_url: str, cache: Path) -> None:
    target = store.snapshot_dir(REF, cache)
    target.mkdir(parents=True)
    store.partial_path(target, hub.BIG).write_bytes(hub.FILES[hub.BIG][:1_000_000])
    with hub.front(hub_url, "whole", on=hub.BIG) as front:
        found, _ = fetch(front.url, cache)
    assert found.fetched_bytes == hub.TOTAL
    assert hub.contents(target) == hub.FILES


@pytest.mark.parametrize("damage", [b"short", None])
def test_damaged_files_are_fetched_again(hub_url: str, cache: Path, damage: bytes | None) -> None:
    target = Path(fetch(hub_url, cache)[0].path)
    big = target / hub.BIG
    big.write_bytes(damage or b"?" + hub.FILES[hub.BIG][1:])
    found, _ = fetch(hub_url, cache)
    assert found.fetched_bytes == hub.BIG_BYTES
    assert hub.contents(target) == hub.FILES


def test_old_cache_is_used_where_it_is(hub_url: str, cache: Path) -> None:
    old = hub.make_model(cache / "models", "demo/tiny-1___5")
    found, _ = fetch(hub_url, cache)
    assert (found.path, found.fetched_bytes) == (str(old), 0)


def test_proxies_do_not_stand_before_this_machine(hub_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.com")
    before = dict(os.environ)
    fetch(hub_url, cache)
    assert dict(os.environ) == before


def test_the_stock_sdk_finds_it_offline(hub_url: str, cache: Path) -> None:
    from modelscope_hub import HubApi, HubConfig

    found, _ = fetch(hub_url, cache)
    api = HubApi(config=HubConfig(endpoint="http://127.0.0.1:1", token="", cache_dir=cache))
    assert str(api.download_repo(hub.MODEL, "model", local_files_only=True)) == found.path


@pytest.mark.parametrize("ref", [ModelRef("demo/none"), ModelRef(hub.MODEL, "main")])
def test_what_is_not_there_leaves_nothing(hub_url: str, cache: Path, ref: ModelRef) -> None:
    with pytest.raises(NotFoundError):
        fetch(hub_url, cache, ref)
    assert not cache.exists()


def test_unreachable_hub_points_to_the_copy_on_disk(hub_url: str, cache: Path) -> None:
    path = fetch(hub_url, cache)[0].path
    with pytest.raises(UnavailableError) as caught:
        fetch("http://127.0.0.1:1", cache)
    assert path in caught.value.hint


def test_a_cut_listing_is_walked(hub_url: str, tmp_path: Path, cache: Path) -> None:
    many = {f"d{i % 7}/{i}": b"" for i in range(3010)}
    root = tmp_path / "many"
    hub.make_model(root, "demo/many", {"config.json": b"{}", **many})
    with hub.mirror(root) as url:
        files = sdk.walk(ModelRef("demo/many"), url, None, cache)
        assert {file.path for file in files} == {"config.json", *many}


def test_a_listing_of_full_length_is_not_believed(hub_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "TRUNCATED_AT", 3)
    with hub.front(hub_url, "html", times=0) as front:
        fetch(front.url, cache)
        assert front.asked("/repo/files") == 2


def test_a_stored_login_goes_to_modelscope_only(tmp_path: Path) -> None:
    from modelscope_hub import HubConfig

    HubConfig(endpoint="https://modelscope.cn", token="").save_token("secret")
    assert sdk.login_token("https://www.modelscope.cn") == "secret"
    assert sdk.login_token("http://127.0.0.1:8700") is None
    assert sdk.login_token("https://modelscope.cn.example.com") is None


def test_the_token_does_not_follow_a_redirect(hub_url: str, cache: Path) -> None:
    with hub.front(hub_url, "html", times=0) as cdn:
        elsewhere = cdn.url.replace("127.0.0.1", "localhost")
        with hub.front(hub_url, f"redirect={elsewhere}", on="/models/") as front:
            client.download(REF, cache_dir=cache, endpoint=front.url, token="secret")
            asked = [entry for entry in front.log() if "/models/" in entry["target"]]
            assert all("Authorization" in entry["headers"] for entry in asked)
        assert len(cdn.log()) == 1 + len(hub.FILES)
        assert all(entry["headers"] == {} for entry in cdn.log())
    assert hub.contents(store.snapshot_dir(REF, cache)) == hub.FILES


def test_no_warning_is_shown(hub_url: str, cache: Path) -> None:
    # in a process of its own: filters of warnings belong to all threads, the hub's and the tests' before this one too
    code = (
        "import sys, warnings; from pathlib import Path; from tests.hub.test_client import fetch;"
        "warnings.simplefilter('error'); fetch(sys.argv[1], Path(sys.argv[2])); print('fetched')"
    )
    command = [sys.executable, "-c", code, hub_url, str(cache)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("fetched\n", "")
