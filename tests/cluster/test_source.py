"""What of a user's source is sent to other machines, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdeploy.errors import ConfigError
from mdeploy.serving import cluster_node, cluster_source
from mdeploy.serving.cluster_node import NodeOptions


def write(path: Path, text: str = "x = 1\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_source_is_packed_and_its_places_are_known(tmp_path: Path) -> None:
    home, lib = tmp_path / "app", tmp_path / "lib"
    for name in (
        "app.py",
        "part/deep.py",
        ".git/config",
        "env/pyvenv.cfg",
        "env/lib.py",
        "__pycache__/app.pyc",
        "a.pyc",
    ):
        write(home / name)
    write(lib / "package/mod.py")
    handlers = (f"{home}/app.py:Echo", "package.mod:Other")
    parcel = cluster_source.pack(handlers, (str(home), str(lib)), tmp_path / "parcel")
    found = sorted(str(file.relative_to(parcel.root)) for file in parcel.root.rglob("*") if file.is_file())
    assert found == ["source0/app.py", "source0/part/deep.py", "source1/package/mod.py"]
    assert parcel.handlers == ("source0/app.py:Echo", "package.mod:Other")
    assert parcel.paths == ("source0", "source1")
    assert parcel.at_home("source0/app.py") == f"{home}/app.py"
    assert parcel.at_home("/usr/lib/python3/other.py") == ""
    there = "/tmp/s/runtime_resources/working_dir_files/_ray_pkg_0a/source1/package/mod.py"
    assert parcel.translate(f'  File "{there}", line 3') == f'  File "{lib}/package/mod.py", line 3'


def test_a_change_changes_the_digest(tmp_path: Path) -> None:
    file = write(tmp_path / "app" / "app.py")
    digests: set[str] = set()
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        file.write_text(text)
        parcel = cluster_source.pack((str(file),), (), tmp_path / f"parcel{text[4]}{len(digests)}")
        digests.add(cluster_source.digest(parcel.root))
    assert len(digests) == 2


def test_weights_beside_the_source_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "app" / "app.py")
    with (tmp_path / "app" / "weights.bin").open("wb") as weights:
        weights.truncate(cluster_source.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match="too much to be sent") as refused:
        cluster_source.pack((str(file),), (), tmp_path / "parcel")
    assert "--model" in refused.value.hint


@pytest.mark.parametrize(
    "options",
    [
        NodeOptions("10.0.0.1:6379", "10.0.0.1", 8000, is_head=True),
        NodeOptions("10.0.0.1:6379", "10.0.0.2", 8000, cpus=4, gpus=0, store_bytes=1 << 30),
    ],
)
def test_a_node_is_told_by_words_that_hold_no_token(options: NodeOptions) -> None:
    assert cluster_node.parse(options.argv()) == options
    words = options.ray_argv("/tmp/x")
    assert f"--node-ip-address={options.ip}" in words
    assert ("--head" in words) == options.is_head
    assert not any("token" in word for word in words)
