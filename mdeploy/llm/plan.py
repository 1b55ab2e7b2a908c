"""How an LLM runs on this machine: devices, parallelism, memory. Values in, values out.

Wishes on the command line win. One that vLLM would refuse is refused here, in plain words,
before 20 to 100 seconds of start-up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mdeploy import devices
from mdeploy.errors import DoesNotFitError, UsageError
from mdeploy.specs import Gpu, GpuPlan, LlmOptions, ModelFacts, Recipe

_CPU_SEQUENCES = 32
"""Concurrent full-length sequences a CPU service keeps a KV cache for; memory permitting."""

_CPU_KV_SHARE = 0.3
"""The largest share of free memory its KV cache may take; vLLM's default would take nearly all."""

_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_NOBODY: Mapping[int, str] = {}
_SUFFIXES = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}


def plan_cpu(facts: ModelFacts, wish: LlmOptions, recipe: Recipe | None, cores: int, free_bytes: int) -> GpuPlan:
    """A run without GPUs.

    `cores` are the usable ones, `free_bytes` the memory not in use. Raises UsageError for
    impossible wishes.
    """
    if wish.gpus or wish.gpu_count:
        raise UsageError("--gpus needs a CUDA engine", hint="mdeploy engines install vllm --variant cuda")
    tp = 1 if wish.tp is None else wish.tp
    _check(facts, wish, tp)
    max_len, reasons = _max_len(facts, wish, recipe)
    reasons.append("no CUDA engine in use: runs on the CPU, eager, which is for trying things out")
    return GpuPlan(
        device="cpu",
        indices=(),
        tp=tp,
        util=wish.gpu_memory_utilization,
        max_len=max_len,
        dtype=wish.dtype or ("float32" if facts.dtype == "float32" else None),
        kv_cache_bytes=None if wish.gpu_memory_utilization else _cpu_kv_bytes(facts, max_len, free_bytes),
        # One core stays with the API server: sharing all of them collapses the throughput.
        threads=max(1, (cores - 1) // tp),
        reasons=tuple(reasons),
    )


def plan_cuda(
    facts: ModelFacts,
    wish: LlmOptions,
    recipe: Recipe | None,
    gpus: Sequence[Gpu],
    taken: Mapping[int, str] = _NOBODY,
    before: Sequence[int] = (),
) -> GpuPlan:
    """A run on GPUs: the ones wished for, else those it had `before`, else those with the most free memory.

    `taken` says which GPUs belong to whom: none of them is chosen unless it is wished for by number.
    Raises DoesNotFitError without enough GPUs, UsageError for impossible wishes.
    """
    tp = (len(wish.gpus or ()) or wish.gpu_count or 1) if wish.tp is None else wish.tp
    _check(facts, wish, tp)
    _check_count(gpus, wish, tp)
    if wish.gpus:
        chosen, why = wish.gpus, devices.as_wished(wish.gpus, taken)
    else:
        chosen, why = devices.choose(gpus, tp, taken, before)
    max_len, reasons = _max_len(facts, wish, recipe)
    reasons.append(f"GPU {', '.join(map(str, chosen))}: {why}")
    util = wish.gpu_memory_utilization or (recipe.gpu_memory_utilization if recipe else None)
    named = wish.gpus is not None
    return GpuPlan("cuda", chosen, tp, util, max_len, wish.dtype, named=named, reasons=tuple(reasons))


def _check(facts: ModelFacts, wish: LlmOptions, tp: int) -> None:
    if tp < 1:
        raise UsageError(f"--tp {tp}: at least 1")
    if facts.heads and facts.heads % tp:
        fitting = ", ".join(str(n) for n in range(1, min(facts.heads, 16) + 1) if facts.heads % n == 0)
        raise UsageError(
            f"--tp {tp}: the model's {facts.heads} attention heads cannot be divided by {tp}",
            hint=f"--tp may be {fitting}",
        )
    util = wish.gpu_memory_utilization
    if util is not None and not 0 < util <= 1:
        raise UsageError(f"--gpu-memory-utilization {util}: more than 0, at most 1")
    if wish.dtype is not None and wish.dtype not in _DTYPES:
        raise UsageError(f"--dtype {wish.dtype}: one of {', '.join(_DTYPES)}")


def _check_count(gpus: Sequence[Gpu], wish: LlmOptions, tp: int) -> None:
    """Whether this machine has the GPUs at all, whoever uses them."""
    present = {gpu.index for gpu in gpus}
    if not present:
        raise DoesNotFitError(
            "no GPU found (nvidia-smi lists none) and the engine is a CUDA build",
            hint="mdeploy engines install vllm --variant cpu   (to try things out without a GPU)",
        )
    known = ", ".join(map(str, sorted(present)))
    devices.check_present(gpus, wish.gpus or ())
    named = len(wish.gpus) if wish.gpus else wish.gpu_count
    if named and named != tp:
        raise UsageError(f"--tp {tp} with {named} GPUs in --gpus", hint="name as many GPUs as --tp says")
    if tp > len(present):
        raise DoesNotFitError(f"--tp {tp} needs {tp} GPUs, this machine has {len(present)}", hint=f"GPUs: {known}")


def _max_len(facts: ModelFacts, wish: LlmOptions, recipe: Recipe | None) -> tuple[str | None, list[str]]:
    """The context length to ask for: a wish as it is, a recipe's number no larger than the model's."""
    if wish.max_model_len is not None:
        tokens = parse_tokens(wish.max_model_len)
        if tokens and facts.max_len and tokens > facts.max_len:
            raise UsageError(
                f"--max-model-len {wish.max_model_len}: the model was made for {facts.max_len} tokens",
                hint=f"--max-model-len {facts.max_len}",
            )
        return wish.max_model_len, ["context length as wished"]
    if recipe and recipe.max_model_len:
        limit = min(recipe.max_model_len, facts.max_len or recipe.max_model_len)
        return str(limit), [f"context length {limit} from the recipe"]
    return None, []


def parse_tokens(text: str) -> int | None:
    """`8192`, `8k` (8000), `8K` (8192) as tokens, as vLLM reads them; None for `auto` (-1 too)."""
    if text in ("auto", "-1"):
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmM]?)", text)
    if not match or float(match[1]) * _SUFFIXES[match[2]] < 1:
        raise UsageError(f"--max-model-len {text}: not a number of tokens", hint="for example 8192, 8k or auto")
    return int(float(match[1]) * _SUFFIXES[match[2]])


def kv_bytes_per_token(facts: ModelFacts) -> int | None:
    """Bytes of key and value of one token over all layers: layers · kv_heads · 2 · head_dim · b."""
    if not (facts.layers and facts.kv_heads and facts.head_dim):
        return None
    return facts.layers * facts.kv_heads * 2 * facts.head_dim * _BYTES.get(facts.dtype, 2)


def _cpu_kv_bytes(facts: ModelFacts, max_len: str | None, free_bytes: int) -> int | None:
    per_token = kv_bytes_per_token(facts)
    tokens = (parse_tokens(max_len) if max_len else None) or facts.max_len
    if not per_token or not tokens:
        return None
    rounded = -(-tokens // 128) * 128 + 128  # vLLM's CPU cache has blocks of 128 tokens and one spare
    wanted = rounded * per_token * _CPU_SEQUENCES
    return int(max(min(wanted, free_bytes * _CPU_KV_SHARE), 64 << 20))
