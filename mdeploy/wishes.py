"""What a user wishes of an app or of an embedding service, whoever says it (command line, recipe, mdeploy.yaml):
joined, checked, handed on.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mdeploy import devices
from mdeploy.errors import UsageError
from mdeploy.paths import expand
from mdeploy.serving.info import BOUNDS, WHOLE
from mdeploy.specs import AppRecipe, AppWish, EmbedRecipe, EmbedWish

# key -> the class attribute of a handler that it stands for
_NUMBERS: Mapping[str, str] = {
    "workers_per_gpu": "workers_per_device",
    "batch": "max_batch_size",
    "batch_cost": "max_batch_cost",
    "max_wait_ms": "max_wait_ms",
    "timeout": "timeout",
    "queue": "queue_size",
}
_BOUNDS = {**BOUNDS, "max_batch_cost": (1e-9, 1e18)}
_EMBED_NUMBERS: Mapping[str, tuple[float, float]] = {
    "workers_per_gpu": BOUNDS["workers_per_device"],
    "timeout": BOUNDS["timeout"],
    "dimensions": (1, 65536),
    "batch_tokens": (16, 1 << 22),
    "max_length": (8, 1 << 22),
    "max_body": (1, 1 << 50),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": ("mdeploy", "vllm"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention": ("auto", "packed", "padded"),
    "token_ids": ("reject", "model"),
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
OF_VLLM = ("tp", "engine", "args")
"""Keys of EmbedWish that go with the backend `vllm` alone."""

OF_OURS = (
    "workers_per_gpu",
    "dimensions",
    "batch_tokens",
    "attention",
    "compile",
    "truncate",
    "token_ids",
    "instruction",
    "timeout",
    "max_body",
    "cors",
    "python",
)
"""Keys of EmbedWish that go with our own backend alone."""

_OF_MODEL_RECIPE = (
    "backend",
    "dtype",
    "max_length",
    "workers_per_gpu",
    "dimensions",
    "batch_tokens",
    "attention",
    "compile",
    "truncate",
    "token_ids",
    "instruction",
    "timeout",
)
Wish = TypeVar("Wish", AppWish, EmbedWish)

_TEXTS = ("name", "path")
_OF_ONE_HANDLER = (*_TEXTS, *_NUMBERS)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+")
_SIZE = re.compile(r"([0-9]{1,15}) *([KMGT]?)(i?B|)", re.IGNORECASE)


def joined(first: Wish, then: Wish) -> Wish:
    """What the first leaves open taken from the other; `config` handler by handler."""
    pairs = {f.name: (getattr(first, f.name), getattr(then, f.name)) for f in dataclasses.fields(first)}
    found = {name: theirs if own is None else own for name, (own, theirs) in pairs.items()}
    if first.gpus is not None or first.gpu_count is not None:
        found["gpus"], found["gpu_count"] = first.gpus, first.gpu_count
    if isinstance(first, AppWish) and isinstance(then, AppWish):
        found["config"] = {**(then.config or {}), **(first.config or {})} or None
    return type(first)(**found)


def of_model_recipe(recipe: EmbedRecipe) -> EmbedWish:
    """What the recipe of an embedding model wishes. Raises UsageError for values that are none."""
    gpus = ",".join(map(str, recipe.gpus)) if isinstance(recipe.gpus, tuple) else recipe.gpus
    same = {name: getattr(recipe, name) for name in _OF_MODEL_RECIPE}
    return EmbedWish(
        **same,
        gpus=None if gpus is None else gpus_of(str(gpus)),
        max_body=None if recipe.max_body is None else size_of(str(recipe.max_body)),
        cors=_several(recipe.cors) or None,
        args=recipe.args or None,
    )


def of_recipe(recipe: AppRecipe, base: Path) -> AppWish:
    """What a recipe wishes; its relative paths start at `base`. Raises UsageError for GPUs that are none."""
    gpus = ",".join(map(str, recipe.gpus)) if isinstance(recipe.gpus, tuple) else recipe.gpus
    return AppWish(
        handlers=tuple(_anchored_handler(text, base) for text in _several(recipe.handler)),
        python=recipe.python and _anchored_program(recipe.python, base),
        paths=tuple(str(expand(text, base)) for text in _several(recipe.path)) or None,
        gpus=None if gpus is None else gpus_of(str(gpus)),
        workers_per_gpu=recipe.workers_per_gpu,
        batch=recipe.batch,
        batch_cost=recipe.batch_cost,
        max_wait_ms=recipe.max_wait_ms,
        timeout=recipe.timeout,
        queue=recipe.queue,
        max_body=None if recipe.max_body is None else size_of(str(recipe.max_body)),
        cors=_several(recipe.cors) or None,
        config=recipe.config or None,
    )


def gpus_of(text: str) -> Any:
    """`0,1` as indices, `all` and `none` as they are. Raises UsageError for anything else."""
    if text in ("all", "none"):
        return text
    found = devices.indices(text)
    if found is None:
        raise UsageError(f"--gpus {text}: GPU numbers separated by commas, each once, like 0,1; or all, or none")
    return found


def size_of(text: str) -> int:
    """The same as `bytes_of`. Raises UsageError for what is no size."""
    found = bytes_of(text)
    if found is None:
        raise UsageError(f"{text!r} is no size", hint="bytes, or a size like 64MiB")
    return found


def bytes_of(text: str) -> int | None:
    """`64MiB`, `10MB`, `512k` or a plain number as bytes; None for what is no size."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        return None
    base = 1000 if match[2] and match[3].upper() == "B" else 1024
    return int(match[1]) * int(base ** " KMGT".index(match[2].upper() or " "))


def _several(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _anchored_handler(text: str, base: Path) -> str:
    """A file of the recipe's by its absolute name; a module as it is."""
    where, colon, cls = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    return f"{expand(where, base)}{colon}{cls}" if where.endswith(".py") else text


def _anchored_program(text: str, base: Path) -> str:
    return str(expand(text, base)) if "/" in text or text.startswith("~") else text


# checks


def problems(wish: AppWish) -> Iterator[tuple[str, str]]:
    """Every key that cannot be as it is, and what is wrong with it."""
    yield from _numbers({name: getattr(wish, name) for name in _NUMBERS})
    if wish.max_body is not None and wish.max_body < 1:
        yield "max_body", "must be at least 1 byte"
    yield from (("cors", text) for text in map(_no_origin, wish.cors or ()) if text)
    for handler, keys in (wish.config or {}).items():
        where = f"config.{handler}"
        for name in keys:
            if name not in _OF_ONE_HANDLER:
                near = difflib.get_close_matches(name, _OF_ONE_HANDLER, n=1)
                known = f"did you mean {near[0]}?" if near else f"known are {', '.join(_OF_ONE_HANDLER)}"
                yield f"{where}.{name}", f"is no option of a handler: {known}"
        yield from ((f"{where}.{name}", text) for name, text in _numbers(keys))
        texts = ((name, keys[name]) for name in _TEXTS if name in keys)
        yield from ((f"{where}.{name}", "must be text") for name, value in texts if not isinstance(value, str))


def _no_origin(text: str) -> str:
    """Why no browser ever sends this as the origin of a page; empty where it may."""
    if text in ("*", "null") or _ORIGIN.fullmatch(text):
        return ""
    return f"must be * or an origin like https://example.com:8443, without a path, not {text!r}"


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, attribute in _NUMBERS.items():
        value = values.get(name)
        if value is None:
            continue
        least, most = _BOUNDS[attribute]
        is_whole = attribute in WHOLE
        if isinstance(value, bool) or not isinstance(value, (int,) if is_whole else (int, float)):
            yield name, f"must be a {'whole ' if is_whole else ''}number, not {value!r}"
        elif not least <= value <= most:
            yield name, f"must be from {least:g} to {most:g}, not {value:g}"


def embed_problems(wish: EmbedWish) -> Iterator[tuple[str, str]]:
    """Every key of an embedding service that cannot be as it is, and what is wrong with it."""
    for name, (least, most) in _EMBED_NUMBERS.items():
        value = getattr(wish, name)
        if value is not None and not least <= value <= most:
            yield name, f"must be from {least:.10g} to {most:.10g}, not {value:.10g}"
    for name, known in _CHOICES.items():
        value = getattr(wish, name)
        if value is not None and value not in known:
            near = [_SHORT[value]] if value in _SHORT else difflib.get_close_matches(value, known, n=1)
            mend = f"did you mean {near[0]}?" if near and near[0] in known else f"one of {', '.join(known)}"
            yield name, f"cannot be {value!r}: {mend}"
    yield from (("cors", text) for text in map(_no_origin, wish.cors or ()) if text)


def foreign_to_backend(wish: EmbedWish) -> tuple[str, ...]:
    """Keys that are set and that the backend wished for does not have."""
    foreign = OF_OURS if wish.backend == "vllm" else OF_VLLM
    return tuple(name for name in foreign if getattr(wish, name) not in (None, ()))


def check(wish: AppWish | EmbedWish) -> None:
    """Raise UsageError that lists every problem."""
    problem = embed_problems(wish) if isinstance(wish, EmbedWish) else problems(wish)
    found = [f"{name.replace('_', '-')} {text}" for name, text in problem]
    if found:
        raise UsageError("; ".join(found))


def overrides(wish: AppWish) -> dict[str, dict[str, Any]]:
    """`config` in the words of handler classes."""
    config = wish.config or {}
    return {handler: {_NUMBERS.get(key, key): value for key, value in keys.items()} for handler, keys in config.items()}
