"""The files that sentence-transformers leaves beside a model: which steps follow it, and how it pools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mdeploy.errors import ConfigError

PROMPTS = "config_sentence_transformers.json"

_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where the longest text is written; old models name the file by their kind."""

_KNOWN = ("Transformer", "Pooling", "Normalize")
_MODES: Mapping[str, Literal["last", "mean", "cls"]] = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
}
"""Names of Pooling's modes, older files' first."""


@dataclass(frozen=True, slots=True)
class Modules:
    """What follows the transformer; None for what no file says."""

    pooling: Literal["last", "mean", "cls"] | None = None
    max_length: int | None = None


def read(path: Path) -> Modules:
    """Raises ConfigError for steps or poolings that are not supported, and for broken files."""
    file = path / "modules.json"
    steps = _steps(file) if file.is_file() else {"Transformer": ""}
    unknown = sorted(steps.keys() - set(_KNOWN))
    if unknown:
        raise ConfigError(f"{file}: {', '.join(unknown)} after the transformer is not supported, only Pooling is")
    if steps.get("Transformer"):
        raise ConfigError(f"{file}: the transformer is in {steps['Transformer']}, it is expected beside modules.json")
    told = next((path / name for name in _SETTINGS if (path / name).is_file()), path / _SETTINGS[0])
    settings = values(told, missing_ok=True)
    if settings.get("do_lower_case") and not _lowers(path / "tokenizer.json"):
        raise ConfigError(f"{told}: do_lower_case is set, but tokenizer.json does not")
    length = settings.get("max_seq_length")
    pooling = _pooling(path / steps["Pooling"] / "config.json") if "Pooling" in steps else None
    return Modules(pooling, length if isinstance(length, int) and length > 0 else None)


def values(file: Path, *, missing_ok: bool = False) -> Mapping[str, Any]:
    """A JSON object. Raises ConfigError."""
    found = _json(file, missing_ok=missing_ok)
    if isinstance(found, dict):
        return found
    raise ConfigError(f"{file} is no JSON object", hint="download the model again: mdeploy download ID")


def _json(file: Path, *, missing_ok: bool) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        if missing_ok:
            return {}
        raise ConfigError(f"{file} is missing: {file.parent} holds no whole model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


def _steps(file: Path) -> dict[str, str]:
    """Names of the steps without the package they are in, with their directories."""
    found = _json(file, missing_ok=False)
    try:
        steps = {str(step["type"]).rpartition(".")[2]: str(step["path"]) for step in found}
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file} is no list of steps with `type` and `path`") from error
    if "Transformer" not in steps:
        raise ConfigError(f"{file} names no Transformer")
    return steps


def _pooling(file: Path) -> Literal["last", "mean", "cls"]:
    config = values(file)
    if config.get("include_prompt") is False:
        raise ConfigError(f"{file}: pooling without the prompt (include_prompt) is not supported")
    modes = [name.removeprefix("pooling_mode_") for name, on in config.items() if name != "pooling_mode" and on is True]
    modes = [mode for mode in modes if mode != "include_prompt"]
    if config.get("pooling_mode"):
        modes = [str(config["pooling_mode"])]
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    raise ConfigError(f"{file}: pooling by {' and '.join(modes) or 'nothing'} is not supported; last, mean and cls are")


def _lowers(tokenizer: Path) -> bool:
    text = json.dumps(values(tokenizer).get("normalizer"))
    return '"lowercase": true' in text or '"type": "Lowercase"' in text
