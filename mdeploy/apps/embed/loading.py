"""A model on its device: the class that transformers has for it, never code that the model brings."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.serving.load import LoadError

VARIABLE = "MDEPLOY_EMBED"
"""Carries `Settings` as JSON."""

_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the service asks of its workers; None and auto leave it to the model and the machine."""

    dtype: str = "auto"
    batch_tokens: int | None = None
    max_length: int | None = None
    attention: Literal["auto", "packed", "padded"] = "auto"
    compile: bool = False


def settings() -> Settings:
    """Those of this process."""
    return Settings(**json.loads(os.environ.get(VARIABLE) or "{}"))


def say(text: str) -> None:
    """A line for the log of the service."""
    print(f"mdeploy-app: {text}", file=sys.stderr, flush=True)


def dtype_for(device: str, asked: str) -> tuple[torch.dtype, str]:
    """The type to compute in, and why. Raises LoadError for one that is none."""
    if asked not in ("auto", *_DTYPES):
        raise LoadError(f"dtype {asked}: auto, {', '.join(_DTYPES)} are known")
    if asked != "auto":
        return _DTYPES[asked], "asked for"
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "a GPU this old has no bfloat16"
    flags = _cpu_flags() & _BF16_FLAGS
    if flags:
        return torch.bfloat16, f"the CPU has {min(flags)}"
    return torch.float32, "the CPU has neither AMX nor AVX512-BF16"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def load(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Any:
    """The model, ready to be asked: in eval mode, without a cache of keys and values. Raises LoadError."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if int(transformers.__version__.partition(".")[0]) < 5:
        command = f"{sys.executable} -m pip install -U 'transformers>=5'"
        raise LoadError(f"transformers {transformers.__version__} is too old, 5 is needed: {command}")
    classes = {"cross-encoder": "AutoModelForSequenceClassification", "gme": "Qwen2VLModel"}
    cls = getattr(transformers, classes.get(checkpoint.kind, "AutoModel"))
    options = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # told of them, we say which
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            model, told = cls.from_pretrained(checkpoint.path, **options)
    except (ValueError, KeyError, ImportError, OSError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise LoadError(f"transformers {transformers.__version__} cannot load {checkpoint.path}: {why}") from error
    _check(checkpoint, told)
    for config in (model.config, getattr(model.config, "text_config", None)):
        if config is not None:
            config.use_cache = False
    return model.eval().requires_grad_(False).to(device)


def _check(checkpoint: Checkpoint, told: Mapping[str, Any]) -> None:
    """transformers fills gaps with random numbers; poolers are often missing, and embedders do not use them."""
    missing = sorted(map(str, told.get("missing_keys", ())))
    if checkpoint.kind == "embedder":
        missing = [name for name in missing if not name.startswith("pooler.")]
    other = [
        f"{name} {list(found)} (config.json: {list(asked)})" for name, found, asked in told.get("mismatched_keys", ())
    ]
    if other:
        why = f"{', '.join(sorted(other)[:3])}: download the model again"
        raise LoadError(f"the weights in {checkpoint.path} are not of the sizes that its config.json says: {why}")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LoadError(
            f"the weights in {checkpoint.path} lack {', '.join(missing[:3])}{more} of {checkpoint.architecture}"
        )


def compiled(base: Any, use: Callable[[Any], object], backend: Any) -> Any:
    """A model through torch.compile, for rows of any length, or as it is where that fails.

    torch compiles when a model is asked first, so `use` asks it, better twice: with a second length it learns that
    lengths vary. An error of it means that what was compiled is wrong.
    """
    say("compiling, which takes a minute or two")
    began = time.monotonic()
    fast = torch.compile(base, dynamic=True, backend=backend)
    try:
        use(fast)
    except Exception as error:  # compilers, drivers, headers: whatever is missing, the model works without
        say(f"not compiled: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return base
    say(f"compiled in {time.monotonic() - began:.0f} s")
    return fast
