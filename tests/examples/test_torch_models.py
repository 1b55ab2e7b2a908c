"""Text to text and image to text, asked without a server, in the interpreter they are made for."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.examples import apps
from tests.examples.tiny_words import COLOURS, NUMBERS, TASK

pytestmark = pytest.mark.engine

SENTENCES = [
    *({"text": TASK + word} for word in NUMBERS),
    {"text": TASK + "four", "max_new_tokens": 3},
    {"text": TASK + "four", "max_new_tokens": 4},
    {"text": TASK + "four", "num_beams": 3},
    {"text": TASK + "two", "num_beams": 3, "max_new_tokens": 64},
    {"text": TASK + "two", "num_beams": 3, "length_penalty": 2.5},
]
BAD_SENTENCES = [{"text": " "}, {"text": "half a pair: \ud83d"}, {"text": "one " * 2000}]


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (200, 90)) -> str:
    return base64.b64encode(apps.png(Image.new("RGB", size, colour))).decode()


PICTURES = [
    *({"image": picture(rgb)} for rgb in COLOURS.values()),
    {"image": picture(COLOURS["blue"]), "form": {"prompt": "a photo of"}},
    {"image": picture(COLOURS["red"], (1, 1)), "form": {"prompt": "a photo"}},
    {"image": picture(COLOURS["green"]), "form": {"prompt": "a picture of"}},
    {"image": picture(COLOURS["green"]), "form": {"max_new_tokens": "2"}},
    {"image": picture(COLOURS["red"]), "form": {"num_beams": "3"}},
]
BAD_PICTURES = [
    {"image": base64.b64encode(b"no image").decode()},
    {"image": picture((1, 1, 1)), "form": {"num_beams": "9"}},
    {"image": picture((1, 1, 1)), "form": {"max_new_tokens": "x"}},
    {"image": picture((1, 1, 1)), "form": {"prompt": "red " * 10_000}},
    {"image": picture((1, 1, 1)), "form": {"prompt": "red " * 100}},
]


@pytest.fixture(scope="module")
def answers(torch_python: Path, torch_models: Path) -> list[list[dict[str, Any]]]:
    """One process for both models: importing torch takes longest."""
    jobs = [
        {
            "app": str(apps.EXAMPLES / "text-to-text/app.py"),
            "class": "TextToText",
            "model": str(torch_models / "t5"),
            "requests": [{"json": one} for one in SENTENCES + BAD_SENTENCES],
        },
        {
            "app": str(apps.EXAMPLES / "image-to-text/app.py"),
            "class": "Captioner",
            "model": str(torch_models / "blip"),
            "requests": PICTURES + BAD_PICTURES,
        },
    ]
    script = Path(__file__).with_name("direct.py")
    done = subprocess.run(
        [torch_python, script], input=json.dumps(jobs), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def test_texts_are_the_same_alone_together_and_by_the_model_card(answers: list[list[dict[str, Any]]]) -> None:
    good = answers[0][: len(SENTENCES)]
    for one in good:
        assert one["batched"] == one["single"]
        assert one["single"]["text"] == one["reference"]
    assert [one["single"]["text"] for one in good[: len(NUMBERS)]] == list(NUMBERS.values())
    assert {one["single"]["finish_reason"] for one in good[: len(NUMBERS)]} == {"stop"}
    short, longer = good[len(NUMBERS)]["single"], good[len(NUMBERS) + 1]["single"]
    assert [(one["tokens"], one["finish_reason"]) for one in (short, longer)] == [(3, "length"), (4, "length")]
    assert longer["text"].startswith(short["text"])
    costs = [one["cost"] for one in good]
    assert costs[len(NUMBERS) + 2] == 3 * costs[list(NUMBERS).index("four")]


def test_bad_texts_are_refused_one_by_one(answers: list[list[dict[str, Any]]]) -> None:
    for asked, one in zip(BAD_SENTENCES, answers[0][len(SENTENCES) :], strict=True):
        status, message = one["error"]
        assert status == 400, asked
        assert message and len(message) < 200
    assert "tokens, at most 512 are taken" in answers[0][-1]["error"][1]


def test_captions_are_the_same_alone_together_and_by_the_model_card(answers: list[list[dict[str, Any]]]) -> None:
    good = answers[1][: len(PICTURES)]
    for one in good:
        text, distance = one["reference"]
        assert one["batched"] == one["single"] == {"caption": text.strip()}
        assert distance < 1e-5
    captions = [one["single"]["caption"] for one in good]
    assert captions[: len(COLOURS)] == [f"a picture of {colour}" for colour in COLOURS]
    assert captions[len(COLOURS)].startswith("a photo of ")
    assert captions[-3:] == ["a picture of green", "a picture", "a picture of red"]


def test_bad_pictures_are_refused(answers: list[list[dict[str, Any]]]) -> None:
    errors = [one["error"] for one in answers[1][len(PICTURES) :]]
    assert [status for status, _ in errors] == [415, 400, 400, 400, 400]
    assert "102 tokens" in errors[-1][1]
