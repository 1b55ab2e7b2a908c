"""Services of kind embed and gme in a file: what is understood and what is refused."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from mdeploy import settings
from mdeploy.errors import ConfigError
from mdeploy.fleet import file
from mdeploy.prepare_embed import EmbedRequest

ALL = """\
version: 1
defaults: {tp: 2, batch: 4, workers_per_gpu: 2, token_ids: model, batch_cost: 3, gpus: {count: 1}}
services:
  texts:
    kind: embed
    model: ./weights
    dimensions: 256
    dtype: bfloat16
    batch_tokens: 4096
    max_length: 512
    attention: packed
    compile: true
    truncate: false
    instruction: 1e3
    timeout: 2m
    max_body: 2MiB
    cors: "*"
    gpus: "0,1"
    tp: null
  images: {kind: gme, recipe: iic/gme-Qwen2-VL-2B-Instruct}
  chat: {model: a/b}
"""


def _write(path: Path, text: str) -> Path:
    (path / "mdeploy.yaml").write_text(textwrap.dedent(text))
    return path / "mdeploy.yaml"


def test_what_they_say(tmp_path: Path) -> None:
    fleet = file.load(settings.load(), _write(tmp_path, ALL.replace("defaults: {tp: 2, ", "defaults: {")))
    asked = {service.name: file.request(service, fleet.path) for service in fleet.services}
    texts, images = asked["texts"], asked["images"]
    assert isinstance(texts, EmbedRequest)
    assert isinstance(images, EmbedRequest)
    wish = texts.wish
    assert (texts.kind, texts.wanted.model, texts.terms.base) == ("embed", "./weights", tmp_path)
    assert (wish.dimensions, wish.dtype, wish.batch_tokens, wish.max_length) == (256, "bfloat16", 4096, 512)
    assert (wish.attention, wish.compile, wish.truncate, wish.token_ids) == ("packed", True, False, "model")
    assert (wish.instruction, wish.timeout, wish.max_body, wish.cors) == ("1e3", 120.0, 2 << 20, ("*",))
    assert (wish.gpus, wish.gpu_count, wish.workers_per_gpu) == ((0, 1), None, 2)
    assert (images.kind, images.wanted.recipe, images.wish.gpu_count) == ("gme", "iic/gme-Qwen2-VL-2B-Instruct", 1)


def test_mistakes(tmp_path: Path) -> None:
    text = """\
        version: 1
        services:
          a: {kind: embed}
          b: {kind: embed, model: a/b, tp: 2, dimensoins: 5, attention: packd, handler: x.py}
          c: {kind: gme, model: a/b, backend: vllm, truncate: true, gpus: all}
          d: {kind: embed, model: a/b, dtype: bf16, compile: maybe, batch: 4, max_length: 0}
          e: {model: a/b, dimensions: 5}
        """
    with pytest.raises(ConfigError) as error:
        file.load(settings.load(), _write(tmp_path, text))
    assert sorted(line.partition(": ")[2] for line in error.value.message.splitlines()) == [
        "services.a.model: is missing: owner/name, a directory, or a recipe",
        "services.b.attention: cannot be 'packd': did you mean packed?",
        "services.b.dimensoins: unknown key, did you mean dimensions?",
        "services.b.handler: belongs to services of kind app",
        "services.b.tp: does not go with backend: mdeploy",
        "services.c.gpus: all does not go with backend: vllm: name ids, or a count",
        "services.c.truncate: does not go with backend: vllm",
        "services.d.batch: belongs to services of kind app",
        "services.d.compile: must be true or false, not 'maybe'",
        "services.d.dtype: cannot be 'bf16': did you mean bfloat16?",
        "services.d.max_length: must be from 8 to 4194304, not 0",
        "services.e.dimensions: belongs to services of kind embed, gme",
    ]
