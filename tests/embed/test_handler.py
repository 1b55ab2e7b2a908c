"""How the worker's class starts, answers and refuses; one run of `handler_script.py` tells."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def told(torch_python: Path, embed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the script found."""
    script = Path(__file__).with_name("handler_script.py")
    done = subprocess.run(
        [torch_python, script, embed_models, tmp_path_factory.mktemp("models")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def vectors(answer: Any, dim: int) -> Any:
    """Rows of an answer."""
    assert answer["status"] == 200, answer
    return np.array(answer["numbers"]).reshape(-1, dim)


def test_vectors_have_norm_one_and_come_in_order(told: Any) -> None:
    whole = vectors(told["whole"], 64)
    assert np.linalg.norm(whole, axis=1) == pytest.approx(1, abs=1e-5)
    first, cut, twice = told["batch"]
    assert vectors(first, 64)[0] == pytest.approx(whole[0], abs=1e-5)
    assert vectors(twice, 64) == pytest.approx(np.array([whole[0], whole[0]]), abs=1e-5)
    shorter = whole[1:, :32] / np.linalg.norm(whole[1:, :32], axis=1, keepdims=True)
    assert vectors(cut, 32) == pytest.approx(shorter, abs=1e-5)


def test_what_would_break_the_device_is_refused_and_nothing_else(told: Any) -> None:
    *bad, good = told["bad"]
    assert [answer["status"] for answer in bad] == [400] * 4
    assert "token id 262" in bad[0]["message"]
    assert "513 tokens" in bad[1]["message"]
    assert "65 dimensions" in bad[2]["message"]
    assert good["status"] == 200


def test_a_text_without_a_vector_fails_alone(told: Any) -> None:
    before, bad, after = told["no number"]
    assert (bad["status"], bad["code"]) == (500, "bad_vector")
    assert "no vector for one of the texts" in bad["message"]
    assert [vectors(good, 64).shape for good in (before, after)] == [(1, 64), (1, 64)]


def test_facts_and_budget_are_known_when_it_is_ready(told: Any) -> None:
    facts = told["facts"]
    assert told["budget"] == facts["batch_tokens"] == 256
    assert facts["tokens_per_s"] > 0
    kept = {name: facts[name] for name in ("model", "device", "dtype", "dim", "attention")}
    assert kept == {"model": "qwen3", "device": "cpu", "dtype": "float32", "dim": 64, "attention": "packed"}


def test_a_cross_encoder_answers_scores(told: Any) -> None:
    (answer,) = told["scores"]
    one, other = vectors(answer, 1)[:, 0]
    assert one != other
    assert told["scores' facts"]["attention"] == "padded"  # as asked


def test_a_shorter_limit_is_heeded(told: Any) -> None:
    (answer,) = told["too long"]
    assert answer["status"] == 400
    assert "takes 50" in answer["message"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("endless", "does not end texts with a special token"),
        ("lost weights", r"lack encoder\.layer\.1\.output\.dense\.weight"),
        ("broken", "NaN or infinity for simple texts"),
        ("no model", r"config\.json is missing"),
        ("no dtype", "dtype int3"),
    ],
)
def test_what_cannot_work_does_not_start(told: Any, model: str, message: str) -> None:
    assert re.search(message, told[model]), told[model]


def test_weights_of_other_sizes_are_no_start(told: Any) -> None:
    assert "embeddings.word_embeddings.weight" in told["other sizes"]
    assert "not of the sizes that its config.json says" in told["other sizes"]
