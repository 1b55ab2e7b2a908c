"""A GME service: decoders for pictures, workers for the model, and the API in front of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mdeploy.apps import app
from mdeploy.apps.app import Kind, Place
from mdeploy.apps.embed import asked, checkpoint
from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.apps.embed.service import environment
from mdeploy.apps.gme import prompt
from mdeploy.errors import ConfigError
from mdeploy.serving.backend import Backend

if TYPE_CHECKING:
    from mdeploy.serving.edge import Front, Service

MODEL, DECODER = "mdeploy.apps.gme.handler:Embedder", "mdeploy.apps.gme.decode:Decode"
_MOST_DECODERS = 4


def main(options: EmbedOptions) -> int:
    """Serve until told to end; returns the exit status. Raises MdeployError where it cannot start."""
    return app.main(options.app, kind(options))


def kind(options: EmbedOptions) -> Kind:
    """What the service is made of. Raises ConfigError for a model or options that do not fit."""
    found = checkpoint.read(Path(options.model))
    if found.kind != "gme":
        why = f"its architecture is {found.architecture}"
        raise ConfigError(f"{options.model} is no GME-Qwen2-VL: {why}", hint=f"mdeploy serve embed {options.model}")
    about = asked.about(options, found)
    prompts = prompt.prompts(found.path / "tokenizer.json")

    def front(service: Service, backends: Mapping[str, Backend]) -> Front:
        from mdeploy.apps.gme.api import GmeApi
        from mdeploy.apps.gme.inputs import Inputs

        inputs = Inputs(backends["decode"], prompts, about.max_length, options.instruction)
        return GmeApi(service, backends["gme"], about, inputs).front()

    decoders = Place(DECODER, ("cpu",), min(_MOST_DECODERS, len(os.sched_getaffinity(0))), is_helper=True)
    model = Place(MODEL, env=environment(options))
    return Kind((model, decoders), front, Path(__file__).parent.parent / "embed" / "index.html")
