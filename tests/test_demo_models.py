"""The demo models shipped are what scripts/train-demo-models makes, and they answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from mdeploy.llm import facts
from tests.support import DEMO_MODEL, REPO

_SCRIPT = str(REPO / "scripts/train-demo-models")


def test_all_of_them_together_are_small() -> None:
    assets = REPO / "mdeploy/assets/models"
    assert sum(p.stat().st_size for p in assets.rglob("*") if p.is_file()) <= 12_000_000


@pytest.mark.engine
def test_the_shipped_model_passes_its_own_check(real_engine: Path) -> None:
    done = subprocess.run(
        [_SCRIPT, "--python", str(real_engine), "--check", "faq"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.engine
def test_a_short_training_run_writes_the_same_kind_of_model(real_engine: Path, tmp_path: Path) -> None:
    command = [_SCRIPT, "--python", str(real_engine), "--out", str(tmp_path), "--steps", "2", "--no-check", "faq"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "demo/mdeploy-faq"
    assert {p.name for p in made.iterdir()} == {p.name for p in DEMO_MODEL.iterdir()}
    assert facts.read(made) == facts.read(DEMO_MODEL)
    assert json.loads((made / "faq.json").read_text()) == json.loads((DEMO_MODEL / "faq.json").read_text())
    check = subprocess.run([*command[:3], "--out", str(tmp_path), "--check", "faq"], capture_output=True, check=False)
    assert check.returncode != 0
