"""What a checkpoint says of itself: config.json, tokenizer files and safetensors headers.

Reading takes milliseconds and finds in advance what vLLM would report after half a minute,
somewhere in 150 lines of log: no config, missing shards, truncated or unreadable weights.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.specs import ModelFacts

_MAX_HEADER = 100 << 20  # the safetensors format's own limit


def read(directory: Path, *, weights: bool = True) -> ModelFacts:
    """Facts of the model in `directory`; without `weights` (a dry load with random ones) none need be there.

    Raises NotFoundError where there is no such directory, ConfigError where it holds no model
    that could be served, each naming the file.
    """
    if not directory.is_dir():
        raise NotFoundError(f"no directory {directory}", hint="give a local model directory or a hub id owner/name")
    try:
        return _facts(directory, _config(directory), weights)
    except (TypeError, AttributeError, ValueError, LookupError, RecursionError) as error:
        raise ConfigError(
            f"{directory} holds a configuration of another form than expected: {error}", hint="download the model again"
        ) from error


def _facts(directory: Path, config: dict[str, Any], weights: bool) -> ModelFacts:
    text = config.get("text_config") or config
    heads, hidden = _int(text.get("num_attention_heads")), _int(text.get("hidden_size"))
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    return ModelFacts(
        architecture=str(architectures[0]),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "auto"),
        weight_bytes=_weight_bytes(directory) if weights else 0,
        layers=_int(text.get("num_hidden_layers")),
        heads=heads,
        kv_heads=_int(text.get("num_key_value_heads")) or heads,
        head_dim=_int(text.get("head_dim")) or (hidden // heads if heads and hidden else None),
        max_len=_int(text.get("max_position_embeddings")),
        chat_template=_has_chat_template(directory),
    )


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        gguf = next(directory.glob("*.gguf"), None)
        if gguf:
            raise ConfigError(f"{gguf.name} is a GGUF file", hint="use the safetensors form of this model")
        raise ConfigError(
            f"{directory} has no config.json, so it is no model that vLLM could load",
            hint="point at the directory that holds config.json, or download again: mdeploy download ID",
        )
    config = _json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold a JSON object", hint="download the model again")
    return config


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", hint="download the model again") from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot read {path}: {error.strerror}", hint=f"chmod a+r {path}  (or run as its owner)")


def _weight_bytes(directory: Path) -> int:
    """Sum of all tensor bytes; every shard is opened, so a bad one is named here."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted({directory / name for name in _json(index).get("weight_map", {}).values()})
    else:
        shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        return _torch_weights(directory)
    return sum(_shard_bytes(shard) for shard in shards)


def _torch_weights(directory: Path) -> int:
    files = sorted([*directory.glob("*.bin"), *directory.glob("*.pt")])
    if not files:
        raise ConfigError(f"{directory} holds no weights (*.safetensors)", hint="download the model again")
    for path in files:
        _readable(path)
    return sum(path.stat().st_size for path in files)


def _readable(path: Path) -> None:
    _regular(path)
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _regular(path: Path) -> None:
    """Opening a pipe would wait for ever."""
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing, or no regular file", hint="download the model again: mdeploy download ID"
        )


def _shard_bytes(path: Path) -> int:
    """Tensor bytes of one safetensors file: 8 bytes of header length, the header, then the tensors."""
    _regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no safetensors file", hint="download the model again") from error
    if 8 + length + end != size:
        raise ConfigError(
            f"{path} has {size} bytes, its header promises {8 + length + end}: the file is incomplete",
            hint="download the model again",
        )
    return int(end)


def _has_chat_template(directory: Path) -> bool:
    if any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    tokenizer = directory / "tokenizer_config.json"
    return tokenizer.is_file() and bool(_json(tokenizer).get("chat_template"))
