"""Vectors that are known to be right, in a file: made once by a reference, compared with at any time.

{"schema": 1, "model": "…", "dtype": "float32", "how": "…", "items": [{"input": …, "embedding": […]}]}; an item may have
`prompt_name`, `instruction` and `input_type` as a request has them. `input` is a text, or an object with a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdeploy.embedding.types import Item
from mdeploy.errors import ConfigError, NotFoundError

SCHEMA = 1
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One input and its vector; `fields` are what else stood in the request."""

    input: Item
    embedding: Sequence[float]
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Golden:
    """All of a model. `how` says what made them."""

    model: str
    dtype: str
    how: str
    items: tuple[GoldenItem, ...]


def read(path: Path) -> Golden:
    """Raises NotFoundError, or ConfigError for a file that is no golden file."""
    import orjson

    try:
        document = orjson.loads(path.read_bytes())
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}")
        items = tuple(_item(row) for row in document["items"])
        if not items:
            raise ValueError("it has no items")
        return Golden(str(document["model"]), str(document["dtype"]), str(document["how"]), items)
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}", hint="mdeploy selftest NAME --record FILE makes one") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no file of golden vectors: {error}") from error


def _item(row: Any) -> GoldenItem:
    fields = {name: str(row[name]) for name in ("prompt_name", "instruction", "input_type") if name in row}
    return GoldenItem(row["input"], [float(value) for value in row["embedding"]], fields)


def render(golden: Golden) -> bytes:
    """The file: an item a line, so that a difference can be read."""
    import orjson

    rows = [
        orjson.dumps({"input": one.input, **one.fields, "embedding": [round(v, _DIGITS) for v in one.embedding]})
        for one in golden.items
    ]
    about = {"schema": SCHEMA, "model": golden.model, "dtype": golden.dtype, "how": golden.how}
    return orjson.dumps(about)[:-1] + b',"items":[\n' + b",\n".join(rows) + b"\n]}\n"
