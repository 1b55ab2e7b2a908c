"""The real vLLM, installed once: tests that use it run later, where no network is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.network
@pytest.mark.timeout(1500)
def test_our_own_command_installs_it(torch_python: Path) -> None:
    found = subprocess.run(
        [torch_python, "-c", "import torch, transformers; print(torch.ones(2).sum().item())"],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert found.stdout == "2.0\n"
