"""The vectors are those of plain transformers, whatever the batch; one run of `encoder_script.py` tells."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LEAST = {"float32": 0.9999, "bfloat16": 0.999}
APART = {"float32": 0.001, "bfloat16": 0.05}
"""Of scores, which are about 1 in size."""


@pytest.fixture(scope="module")
def told(torch_python: Path, embed_models: Path, minilm: Path) -> Any:
    """What the script found."""
    script = Path(__file__).with_name("encoder_script.py")
    done = subprocess.run(
        [torch_python, script, embed_models, minilm],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "bert", "xlmr"])
def test_vectors_are_those_of_one_text_at_a_time(told: Any, name: str, kind: str) -> None:
    found = told[f"{name} {kind}"]
    assert found["attention"] == "packed"
    assert found["types"] == ["float32"]
    ways = {"packed", "repeated", "in small rows", "one by one", "padded"} | (
        {"left-padded"} if name == "qwen3" else set()
    )
    assert found["close"].keys() == ways
    assert min(found["close"].values()) >= LEAST[kind], found["close"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cross", "cross-xlmr"])
def test_scores_are_those_of_one_pair_at_a_time(told: Any, name: str, kind: str) -> None:
    found = told[f"{name} {kind}"]
    assert found["attention"] == "packed"
    assert min(found["close"].values()) >= 1 - APART[kind], found["close"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_minilm_finds_the_paraphrase_of_each_sentence(told: Any, kind: str) -> None:
    found = told[f"minilm {kind}"]
    assert found["attention"] == "packed"
    assert found["nearest"] == [0, 1, 2, 3, 4, 5]
    assert found["close"] >= LEAST[kind]


def test_a_vector_that_is_cut_has_norm_one_again(told: Any) -> None:
    assert told["minilm float32"]["short"] == pytest.approx(1, abs=1e-6)


def test_a_vector_whose_norm_is_beyond_float32_is_no_zero_vector(told: Any) -> None:
    assert np.isnan(told["huge"]).all()


def test_a_model_that_cannot_be_packed_is_padded(told: Any) -> None:
    assert told["sabotage"]["auto"] == "padded"
    assert told["sabotage"]["close"] >= LEAST["float32"]


@pytest.mark.parametrize("name", ["causal", "both ways"])
def test_windows_of_attention_are_heeded_without_padding(told: Any, name: str) -> None:
    attention, close = told["windows"][name]
    assert attention == "packed"
    assert close >= LEAST["float32"]


@pytest.mark.parametrize("name", ["qwen3", "bert", "xlmr"])
def test_layers_are_prepacked_where_the_cpu_computes_in_bfloat16(told: Any, name: str) -> None:
    can = {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert told[f"{name} bfloat16"]["prepacked"] or not can
    assert not told[f"{name} float32"]["prepacked"]


def test_prepacked_layers_that_compute_something_else_are_taken_out_again(told: Any) -> None:
    wrong = told["wrong layers"]["wrong"]
    assert (wrong["prepacked"], wrong["attention"]) == (False, "packed")
    assert min(wrong["close"].values()) >= LEAST["bfloat16"]
    assert told["wrong layers"]["broken"] == "packed"


@pytest.mark.parametrize(
    ("name", "way"),
    [("mpnet", "padded"), ("gpt2", "packed"), ("gemma", "packed"), ("judge", "packed"), ("decoder", "packed")],
)
def test_each_family_of_models_gives_what_transformers_gives(told: Any, name: str, way: str) -> None:
    attention, close = told["families"][name]
    assert attention == way
    assert close >= LEAST["float32"]


def test_padding_that_a_user_writes_is_read_as_transformers_reads_it(told: Any) -> None:
    assert min(told["written padding"]) >= LEAST["float32"]


def test_a_head_that_judges_otherwise_in_a_batch_is_no_start_in_half_precision_either(told: Any) -> None:
    assert "scores are" in told["families"]["wrong head"]


def test_a_model_that_wants_more_than_texts_is_no_start(told: Any) -> None:
    assert told["families"]["no encoder"].startswith("T5Model gives no vectors of texts: ValueError")


def test_half_precision_may_be_as_far_off_as_a_deep_model_is_noisy_and_no_farther(told: Any) -> None:
    found = told["deep"]
    assert found["quiet"] == found["none"] == 0.999
    assert found["noisy"] == pytest.approx(1 - 4 * 0.0008, abs=1e-5)
    assert found["broken"] == 0.98


def test_packing_that_was_asked_for_and_goes_wrong_is_no_start(told: Any) -> None:
    assert "packed and single vectors have cosine 0." in told["sabotage"]["packed"]
    assert "--attention auto" in told["sabotage"]["packed"]


def test_a_model_that_no_batch_suits_is_no_start(told: Any) -> None:
    assert "other results in a batch than alone" in told["sabotage"]["neither"]


def test_a_row_too_large_for_the_device_is_halved(told: Any) -> None:
    assert told["memory"]["largest"] <= 130
    assert told["memory"]["close"] >= LEAST["float32"]


def test_a_text_too_large_for_the_device_fails(told: Any) -> None:
    assert "out of memory" in told["memory"]["too small"]


def test_the_least_budget_that_is_about_the_best_is_taken(told: Any) -> None:
    found = told["budgets"]
    assert found["flat"] == 512
    assert found["flat and quick"] == 4096
    assert found["costly batches"] == 8192
    assert found["large ones are slow"] == 2048


def test_the_search_for_a_budget_ends_with_memory_or_patience(told: Any) -> None:
    assert told["budgets"]["little memory"] == 2048
    assert told["budgets"]["little patience"] < 8192
    assert "out of memory" in told["budgets"]["no memory"]


def test_a_budget_is_measured_with_texts_the_model_takes(told: Any) -> None:
    tokens, longest, shortest = told["budgets"]["usual"]
    assert (tokens, longest) == (1024, 100)
    assert shortest >= 1


def test_a_packed_model_is_compiled_once_for_rows_of_any_length(told: Any) -> None:
    assert told["compiled"]["graphs"] == 1
    assert told["compiled"]["close"] >= LEAST["float32"]


def test_a_compiled_model_that_computes_something_else_is_not_used(told: Any) -> None:
    assert told["compiled"]["kept"] == {"right": True, "wrong": False}
