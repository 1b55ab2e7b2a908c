from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError, MdeployError
from mdeploy.hub import store
from mdeploy.hub.listing import RepoFile
from mdeploy.specs import ModelRef

REF = ModelRef("a/b-1.5")


def model(directory: Path, *names: str) -> Path:
    for name in names or ("config.json",):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return directory


def test_finds_a_whole_model(tmp_path: Path) -> None:
    expected = model(tmp_path / "models/a--b-1.5/snapshots/master")
    assert store.locate(REF, tmp_path) == expected
    assert store.locate(ModelRef(REF.id, "v1"), tmp_path) is None


@pytest.mark.parametrize("base", ["models", "hub/models"])
def test_finds_the_old_layout(tmp_path: Path, base: str) -> None:
    expected = model(tmp_path / base / "a/b-1___5", "configuration.json")
    assert store.locate(REF, tmp_path) == expected
    assert store.destination(REF, tmp_path) == expected
    assert store.locate(ModelRef(REF.id, "v1"), tmp_path) is None
    (expected / ".mv").write_text("Revision:v1,CreatedAt:1700000000")
    assert store.locate(ModelRef(REF.id, "v1"), tmp_path) == expected
    assert store.locate(REF, tmp_path) is None


@pytest.mark.parametrize("partial", [store.MARKER, "sub/x.bin.incomplete"])
def test_a_part_is_no_model(tmp_path: Path, partial: str) -> None:
    directory = model(tmp_path / "models/a--b-1.5/snapshots/master", "config.json", partial)
    assert store.locate(REF, tmp_path) is None
    assert store.destination(REF, tmp_path) == directory


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    directory = model(tmp_path / "models/a--b-1.5/snapshots/master", "config.json", "one.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}))
    assert store.flaw(directory) == "two.safetensors is missing"
    (directory / "two.safetensors").touch()
    assert store.locate(REF, tmp_path) == directory
    index.write_text("[")
    assert store.locate(REF, tmp_path) is None


def test_no_config_no_model(tmp_path: Path) -> None:
    model(tmp_path / "models/a--b-1.5/snapshots/master", "tokenizer.json")
    assert store.locate(REF, tmp_path) is None


FILES = (RepoFile("config.json", 2, None), RepoFile("x/big.bin", 10, None), RepoFile("x/empty", 0, None))


def fail_after(target: Path, cache: Path, *written: tuple[Path, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt), store.clean_after_failure(REF, FILES, target, cache):
        for path, content in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        store.mark(target)
        raise KeyboardInterrupt


def test_failure_without_bytes_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    target = cache / "models/a--b-1.5/snapshots/master"
    lock = store._lock_file(REF, FILES[1], cache)
    fail_after(target, cache, (target / "x/empty", b""), (target / "x/big.bin.incomplete", b""), (lock, b""))
    assert not cache.exists()


def test_failure_keeps_bytes_and_says_so(tmp_path: Path) -> None:
    target = tmp_path / "models/a--b-1.5/snapshots/master"
    fail_after(target, tmp_path, (target / "config.json", b"{}"), (target / "x/big.bin.incomplete", b"12345"))
    assert store.locate(REF, tmp_path) is None
    assert store.progress_on_disk(FILES, target) == 7


def test_failure_touches_nothing_of_others(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    (target / "x" / "kept").mkdir(parents=True)
    (target / "notes").touch()
    lock = store._lock_file(REF, FILES[1], tmp_path)
    fail_after(target, tmp_path)
    assert sorted(p.name for p in target.rglob("*")) == ["kept", "notes", "x"]
    lock.parent.mkdir()
    lock.touch()
    fail_after(target, tmp_path)
    assert lock.exists()


def test_a_held_lock_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store._remove_unlocked(path)
        assert path.exists()
    store._remove_unlocked(path)
    assert not path.exists()


def test_success_takes_the_marker_away(tmp_path: Path) -> None:
    with store.clean_after_failure(REF, FILES, tmp_path / "m", tmp_path):
        store.mark(tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    target = store.snapshot_dir(REF, tmp_path)
    with pytest.raises(ConfigError, match="models"), store.clean_after_failure(REF, FILES, target, tmp_path):
        pass


def test_too_large_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(MdeployError, match="not enough room"):
        store.check_space((RepoFile("x", 1 << 60, None),), tmp_path / "not" / "there")


def test_a_replaced_file_counts_as_room(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    store.check_space((RepoFile("x", 5, None),), tmp_path)
