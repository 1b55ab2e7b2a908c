from __future__ import annotations

from pathlib import Path

import pytest

from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.apps.gme import service
from mdeploy.errors import ConfigError
from mdeploy.serving.options import AppOptions


def options(model: Path, **more: int) -> EmbedOptions:
    return EmbedOptions(AppOptions("gme", "127.0.0.1", 1, ()), str(model), ("gme",), **more)  # type: ignore[arg-type]


def test_decoders_are_processes_on_the_cpu_and_know_no_model(gme_model: Path) -> None:
    model, decoders = service.kind(options(gme_model)).places
    assert decoders.devices == ("cpu",) and decoders.workers_per_device in range(1, 5)
    assert model.devices is None and model.env["MDEPLOY_MODEL_DIR"] == str(gme_model)
    assert not decoders.env


def test_what_is_not_gme_is_refused(embed_models: Path, gme_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no GME-Qwen2-VL: its architecture is Qwen3") as caught:
        service.kind(options(embed_models / "qwen3"))
    assert caught.value.hint == f"mdeploy serve embed {embed_models / 'qwen3'}"
    with pytest.raises(ConfigError, match="--dimensions is 32"):
        service.kind(options(gme_model, dimensions=32))
