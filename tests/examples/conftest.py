"""Tiny checkpoints of the examples' models, the real structure in some hundred kilobytes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples import served, tiny_onnx


@pytest.fixture(scope="session")
def torch_models(torch_python: Path) -> Path:
    """Directories t5 and blip; kept in ~/.cache by what they were made from."""
    script = Path(__file__).with_name("tiny_torch.py")
    source = script.read_bytes() + script.with_name("tiny_words.py").read_bytes()
    path = Path.home() / ".cache" / "mdeploy-tests" / f"tiny-{hashlib.sha256(source).hexdigest()[:16]}"
    if not path.is_dir():
        partly = path.with_suffix(".partly")
        shutil.rmtree(partly, ignore_errors=True)
        made = subprocess.run([torch_python, script, partly], capture_output=True, text=True, timeout=200, check=False)
        assert made.returncode == 0, made.stderr
        partly.rename(path)
    return path


@pytest.fixture(scope="session")
def onnx_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories resnet, yolo-zoo, yolo-ultralytics, yolo-anchor-free."""
    path = tmp_path_factory.mktemp("onnx")
    tiny_onnx.write(path)
    return path


@pytest.fixture(scope="package")
def captions(
    tmp_path_factory: pytest.TempPathFactory, torch_python: Path, torch_models: Path
) -> Iterator[served.Service]:
    """The image-to-text example, served in a user's own interpreter, with a key."""
    home = tmp_path_factory.mktemp("captions")
    model = torch_models / "blip"
    words = ("--model", model, "--python", torch_python)
    with served.example("image-to-text", home, *words, MDEPLOY_API_KEY="sk-captions-of-a-test") as service:
        yield service
