"""What tests of embedding services need from the network is fetched here; those that use it have none."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.network
def test_the_real_model_is_whole(minilm: Path) -> None:
    assert (minilm / "model.safetensors").stat().st_size == 90_868_376
    assert (minilm / "tokenizer.json").is_file()
