"""An embedding service: its workers, and the API in front of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mdeploy.apps import app
from mdeploy.apps.app import Kind, Place
from mdeploy.apps.embed import asked, checkpoint
from mdeploy.apps.embed.api import Api
from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.apps.embed.prompts import Prompts
from mdeploy.apps.embed.rerank import Pairs
from mdeploy.apps.embed.texts import Texts
from mdeploy.serving.backend import Backend
from mdeploy.serving.edge import Front, Service
from mdeploy.serving.handler import MODEL_VARIABLE

HANDLER = "mdeploy.apps.embed.handler:Embedder"

OPTIONS_VARIABLE = "MDEPLOY_EMBED"
"""Tells workers their part of the options, as JSON."""

_TOLD = ("dtype", "batch_tokens", "max_length", "attention", "compile")


def main(options: EmbedOptions) -> int:
    """Serve until told to end; returns the exit status. Raises MdeployError where it cannot start."""
    return app.main(options.app, kind(options))


def kind(options: EmbedOptions, handler: str = HANDLER) -> Kind:
    """What the service is made of. Raises ConfigError for a model or options that do not fit."""
    found = checkpoint.read(Path(options.model))
    about = asked.about(options, found)
    prompts = Prompts(found, options.instruction)
    texts = Texts(found.path / "tokenizer.json", prompts, about.max_length, options.token_ids)
    scorer = Pairs(about, texts) if about.is_cross_encoder else None

    def front(service: Service, backends: Mapping[str, Backend]) -> Front:
        [backend] = backends.values()
        return Api(service, backend, about, texts, scorer).front()

    place = Place(handler, env=environment(options))
    return Kind((place,), front, Path(__file__).with_name("index.html"))


def environment(options: EmbedOptions) -> dict[str, str]:
    """What workers are told."""
    told = {name: getattr(options, name) for name in _TOLD}
    return {MODEL_VARIABLE: options.model, OPTIONS_VARIABLE: json.dumps(told)}
