"""Whether an embedding model fits a GPU, or the memory of a machine without one. Values in, values out.

The estimate is on the low side: what is refused here would not have run. How large a batch may be is measured by the
worker when it starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.errors import DoesNotFitError
from mdeploy.specs import EmbedWish, Gpu

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NUMBERS_A_TOKEN = 24
"""Values of the hidden size alive at once for each token of a batch: hidden states, projections and the MLP's inner
layer, whose size is 3 to 4 hidden sizes in BERT, Qwen2 and Qwen3."""

_USUAL_TOKENS = 2048
_HIDDEN_OF_RERANKERS = 1024
"""Their vectors have one number, a score; this is the hidden size of the larger ones."""

_PROCESS_BYTES = {"cuda": 600 << 20, "cpu": 300 << 20}
"""What a process with torch takes beside the model: the CUDA context and cuBLAS, or the libraries themselves."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one worker on its device: all of them, and the weights among them in `dtype`."""

    total: int
    weights: int
    dtype: str

    def shown(self, workers: int) -> str:
        """In words."""
        times = f"{workers} workers, each " if workers > 1 else ""
        return f"about {gib(self.total * workers)} ({times}{gib(self.weights)} of weights in {self.dtype})"


def need(model: Checkpoint, wish: EmbedWish, device: str, *, fast_bf16: bool) -> Need:
    """What one worker takes on a device (`cuda` or `cpu`); `fast_bf16` says that the CPU computes in bfloat16."""
    usual = "bfloat16" if device == "cuda" or fast_bf16 else "float32"
    dtype = usual if wish.dtype in (None, "auto") else str(wish.dtype)
    size = _BYTES.get(dtype, 4)
    weights = model.parameters * size or model.weight_bytes * size // _BYTES.get(model.dtype, 4)
    tokens = wish.batch_tokens or min(model.max_length, _USUAL_TOKENS)
    hidden = model.dim if model.kind != "cross-encoder" else _HIDDEN_OF_RERANKERS
    activations = tokens * hidden * _NUMBERS_A_TOKEN * size
    return Need(weights + activations + _PROCESS_BYTES[device], weights, dtype)


def check_gpus(title: str, needed: Need, workers: int, gpus: Iterable[Gpu], serve: str) -> tuple[str, ...]:
    """What is worth knowing of these GPUs. Raises DoesNotFitError for one that is too small.

    `serve` is the command that serves this model, for the hint.
    """
    told = [f"needs {needed.shown(workers)} of GPU memory"]
    for gpu in gpus:
        if not gpu.total_mib:  # it shares the host's memory and does not say how much
            continue
        if needed.total * workers > gpu.total_mib << 20:
            raise _too_large(title, needed, workers, gpu, serve)
        if needed.total * workers > gpu.free_mib << 20:
            told.append(f"GPU {gpu.index} has only {gib(gpu.free_mib << 20)} free right now")
    return tuple(told)


def _too_large(title: str, needed: Need, workers: int, gpu: Gpu, serve: str) -> DoesNotFitError:
    text = f"{title} needs {needed.shown(workers)}, GPU {gpu.index} has {gib(gpu.total_mib << 20)}"
    if needed.total <= gpu.total_mib << 20:
        return DoesNotFitError(text, hint=f"--workers-per-gpu {(gpu.total_mib << 20) // needed.total}")
    if needed.dtype == "float32" and needed.total - needed.weights // 2 <= gpu.total_mib << 20:
        return DoesNotFitError(text, hint="--dtype bfloat16 halves it")
    parts = next((n for n in (2, 4, 8) if needed.total / n <= 0.9 * (gpu.total_mib << 20)), 16)
    return DoesNotFitError(f"{text}: too large for one GPU", hint=f"{serve} --backend vllm --tp {parts}")


def check_host(title: str, needed: Need, workers: int, total: int, free: int) -> tuple[str, ...]:
    """The same for the memory of a machine, in bytes."""
    told = f"needs {needed.shown(workers)} of memory"
    if needed.total * workers > total:
        text = f"{title} {told}, this machine has {gib(total)}"
        hint = "--dtype bfloat16 halves it" if needed.dtype == "float32" else "a smaller model, or a GPU"
        raise DoesNotFitError(text, hint="--workers-per-gpu 1" if needed.total <= total else hint)
    return (told, f"only {gib(free)} are free right now") if needed.total * workers > free else (told,)


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 100 << 20 else f"{size / (1 << 20):.0f} MiB"


def has_fast_bf16(cpuinfo: str) -> bool:
    """Whether a CPU, by the text of /proc/cpuinfo, multiplies matrices in bfloat16."""
    return any(flag in cpuinfo for flag in ("amx_bf16", "avx512_bf16", " bf16 "))
