"""A tiny GME, what plain transformers makes of some inputs with it, and a service."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.embed.served import Service, served
from tests.support import REPO


@pytest.fixture(scope="session")
def gme_model(embed_models: Path) -> Path:
    return embed_models / "gme"


@pytest.fixture(scope="package")
def reference(torch_python: Path, gme_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What reference.py found: plain transformers beside our own model."""
    out = tmp_path_factory.mktemp("reference") / "found.json"
    script = Path(__file__).with_name("reference.py")
    words = (torch_python, script, gme_model, out)
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="package")
def gme(torch_python: Path, gme_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service, as `mdeploy serve gme` starts it."""
    place = tmp_path_factory.mktemp("gme")
    with served(place, gme_model, kind="gme", python=torch_python, dtype="float32", batch_tokens=2048) as service:
        yield service
