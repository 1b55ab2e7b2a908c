"""What a service is told survives its command line, and the table of kinds knows who reads it."""

import subprocess
import sys
from pathlib import Path

import pytest

from mdeploy.apps.embed import asked
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.options import EmbedOptions, parse
from mdeploy.errors import ConfigError
from mdeploy.serving.options import AppOptions

APP = AppOptions("embed", "127.0.0.1", 6008, ())
LEAST = EmbedOptions(APP, "/models/tiny", ("tiny",))
ALL = EmbedOptions(
    AppOptions("e", "0.0.0.0", 1, (), devices=("0", "1"), workers_per_device=2, timeout=5.0),
    "/models/a model",
    ("a/b", "b"),
    dimensions=64,
    dtype="float32",
    batch_tokens=4096,
    max_length=128,
    attention="padded",
    compile=True,
    truncate=True,
    token_ids="model",
    instruction="Find the --place",
    max_inputs=16,
)
MODEL = Checkpoint(Path("/m"), "embedder", "Qwen3Model", "last", dim=64, max_length=512, weight_bytes=1, smallest=32)


@pytest.mark.parametrize("options", [LEAST, ALL], ids=["least", "all"])
def test_words_carry_every_value(options: EmbedOptions) -> None:
    assert parse(options.argv()) == options


def test_defaults_need_no_words() -> None:
    assert LEAST.argv()[len(APP.argv()) :] == ("--model=/models/tiny", "--called=tiny")


def test_an_unknown_kind_names_those_there_are() -> None:
    done = subprocess.run([sys.executable, "-m", "mdeploy.apps", "emebd"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no app 'emebd'" in done.stderr
    assert "embed" in done.stderr


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dimensions": 16}, "--dimensions is 16, this model has 32 to 64"),
        ({"dimensions": 65}, "--dimensions is 65, this model has 32 to 64"),
        ({"max_length": 513}, "--max-length 513: tiny takes at most 512 tokens"),
    ],
)
def test_options_that_the_model_cannot_fulfil_end_the_start(given: dict[str, int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        asked.about(EmbedOptions(APP, "/m", ("tiny",), **given), MODEL)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_cut_says_so() -> None:
    whole = Checkpoint(Path("/m"), "embedder", "BertModel", "mean", dim=384, max_length=256, weight_bytes=1)
    assert "not trained to be cut" in asked.unfit(whole, 128)
    assert asked.unfit(whole, 384) == ""
