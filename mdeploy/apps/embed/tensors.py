"""Whether the weights of a model are whole, and how large they are: from what its files say of themselves."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdeploy.apps.embed import modules
from mdeploy.errors import ConfigError

_MAX_HEADER = 100 << 20  # what the safetensors library reads at most
_HINT = "download the model again: mdeploy download ID"


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors together; `parameters` is 0 where the files do not say."""

    bytes: int
    parameters: int


def measure(path: Path) -> Weights:
    """Raises ConfigError for weights that are missing or cut off."""
    sizes = [_file(file) for file in _files(path)]
    return Weights(sum(size.bytes for size in sizes), sum(size.parameters for size in sizes))


def _files(path: Path) -> list[Path]:
    """The files that transformers would load: safetensors where there are any."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, single = path / f"{name}.index.json", path / name
        if index.is_file():
            where = modules.values(index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise ConfigError(f"{index} names no files (weight_map)", hint=_HINT)
            return [path / file for file in sorted(set(map(str, where.values())))]
        if single.is_file():
            return [single]
    raise ConfigError(f"{path} has no weights (model.safetensors)", hint=_HINT)


def _file(path: Path) -> Weights:
    if not path.is_file():  # a pipe would make us wait for ever
        raise ConfigError(f"{path} is missing, the index names it", hint=_HINT)
    return _pickled(path) if path.suffix == ".bin" else _tensors(path)


def _pickled(path: Path) -> Weights:
    """A file of torch: a zip archive, whose directory is at its end. torch loads it without running what is in it."""
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is cut off, or older than torch 1.6 writes them", hint=_HINT)
    return Weights(path.stat().st_size, 0)


def _tensors(path: Path) -> Weights:
    """A safetensors file: 8 bytes of header length, the header, then the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        entries: list[Any] = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        numbers = sum(math.prod(entry["shape"]) for entry in entries)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}", hint=_HINT) from error
    if 8 + length + end != size:
        raise ConfigError(f"{path} has {size} bytes, its header promises {8 + length + end}: it is cut off", hint=_HINT)
    return Weights(end, numbers)
