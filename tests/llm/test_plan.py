"""Plans: wishes win, impossible ones are refused in words, the rest has a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mdeploy.errors import DoesNotFitError, MdeployError, UsageError
from mdeploy.llm import plan
from mdeploy.specs import Gpu, GpuPlan, LlmOptions, ModelFacts, Recipe

FACTS = ModelFacts("Qwen2ForCausalLM", "bfloat16", 3 << 30, 28, 12, 2, 128, 131072, chat_template=True)
GPUS = tuple(Gpu(i, f"GPU-{i}", "Fake", 24000, free) for i, free in enumerate((100, 24000, 20000, 23000)))


def _cuda(recipe: Recipe | None = None, **wish: Any) -> GpuPlan:
    return plan.plan_cuda(FACTS, LlmOptions(**wish), recipe, GPUS)


def test_the_freest_gpus_are_taken_and_named_in_order() -> None:
    assert _cuda().indices == (1,)
    assert _cuda(tp=2).indices == (1, 3)
    assert "most free memory" in " ".join(_cuda(tp=2).reasons)


def test_gpus_named_imply_tp() -> None:
    chosen = _cuda(gpus=(0, 2))
    assert (chosen.indices, chosen.tp) == ((0, 2), 2)


@pytest.mark.parametrize(
    ("wish", "error", "says"),
    [
        ({"tp": 5}, UsageError, "12 attention heads"),
        ({"tp": 6}, DoesNotFitError, "needs 6 GPUs"),
        ({"tp": 0}, UsageError, "at least 1"),
        ({"gpus": (7,)}, DoesNotFitError, "no GPU 7"),
        ({"gpus": (0, 1), "tp": 4}, UsageError, "2 GPUs"),
        ({"gpu_count": 2, "tp": 4}, UsageError, "2 GPUs"),
        ({"gpu_memory_utilization": 1.5}, UsageError, "at most 1"),
        ({"gpu_memory_utilization": float("nan")}, UsageError, "at most 1"),
        ({"dtype": "int3"}, UsageError, "one of"),
        ({"max_model_len": "200000"}, UsageError, "131072"),
        ({"max_model_len": "-5"}, UsageError, "number of tokens"),
        ({"max_model_len": "lots"}, UsageError, "number of tokens"),
    ],
)
def test_impossible_wishes(wish: dict[str, Any], error: type[MdeployError], says: str) -> None:
    with pytest.raises(error, match=says):
        _cuda(**wish)


def _beside(taken: dict[int, str], before: tuple[int, ...] = (), **wish: Any) -> GpuPlan:
    return plan.plan_cuda(FACTS, LlmOptions(**wish), None, GPUS, taken, before)


def test_what_belongs_to_others_is_not_chosen() -> None:
    chosen = _beside({1: "chat (running)"}, gpu_count=2)
    assert (chosen.indices, chosen.tp, chosen.named) == ((2, 3), 2, False)
    assert "of those nobody has" in " ".join(chosen.reasons)
    with pytest.raises(DoesNotFitError, match=r"2 GPUs needed, 1 of 4 not in use: GPU 0 belongs to a, .*to c") as error:
        _beside({0: "a", 1: "b", 2: "c"}, tp=2)
    assert "--gpus 0,1" in error.value.hint


def test_what_is_named_may_be_shared_and_says_so() -> None:
    chosen = _beside({1: "chat (running)"}, gpus=(1,))
    assert (chosen.indices, chosen.named) == ((1,), True)
    assert "GPU 1 also belongs to chat (running)" in " ".join(chosen.reasons)


def test_what_it_had_before_stays_where_it_can() -> None:
    assert _beside({}, before=(0,)).indices == (0,)
    assert _beside({0: "x"}, before=(0,)).indices == (1,)
    assert _beside({}, before=(0,), tp=2).indices == (1, 3)
    assert _beside({}, before=(9,)).indices == (1,)


def test_no_gpu_and_a_cuda_engine_does_not_fit() -> None:
    with pytest.raises(DoesNotFitError, match="no GPU found") as error:
        plan.plan_cuda(FACTS, LlmOptions(), None, ())
    assert "mdeploy engines install vllm --variant cpu" in error.value.hint


def test_a_recipe_caps_the_context_and_a_wish_overrides_it() -> None:
    recipe = Recipe("llm", "a/b", max_model_len=32768)
    assert _cuda(recipe).max_len == "32768"
    assert _cuda(recipe, max_model_len="64K").max_len == "64K"
    short = dataclasses.replace(FACTS, max_len=2048)
    assert plan.plan_cuda(short, LlmOptions(), recipe, GPUS).max_len == "2048"


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("8k", 8000), ("8K", 8192), ("auto", None), ("1.5k", 1500)]
)
def test_tokens_are_read_as_vllm_reads_them(text: str, tokens: int | None) -> None:
    assert plan.parse_tokens(text) == tokens


def test_kv_bytes_per_token_of_the_default_model() -> None:
    assert plan.kv_bytes_per_token(FACTS) == 28 * 2 * 2 * 128 * 2


def test_a_cpu_run_keeps_most_of_the_memory_and_a_core_free() -> None:
    chosen = plan.plan_cpu(FACTS, LlmOptions(), None, cores=8, free_bytes=10 << 30)
    assert chosen.kv_cache_bytes == int((10 << 30) * 0.3)
    assert (chosen.threads, chosen.indices, chosen.dtype) == (7, (), None)
    assert plan.plan_cpu(FACTS, LlmOptions(tp=4), None, cores=2, free_bytes=1 << 30).threads == 1


def test_a_cpu_run_keeps_float32_weights_as_they_are() -> None:
    single = dataclasses.replace(FACTS, dtype="float32")
    assert plan.plan_cpu(single, LlmOptions(), None, 2, 1 << 30).dtype == "float32"
    assert plan.plan_cpu(single, LlmOptions(dtype="bfloat16"), None, 2, 1 << 30).dtype == "bfloat16"


@pytest.mark.parametrize("wish", [LlmOptions(gpus=(0,)), LlmOptions(gpu_count=1)])
def test_gpus_on_a_cpu_engine_are_refused(wish: LlmOptions) -> None:
    with pytest.raises(UsageError, match="CUDA engine"):
        plan.plan_cpu(FACTS, wish, None, 2, 1 << 30)
