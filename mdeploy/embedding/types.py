"""The frozen values of a client: whom to ask, how, and what came back."""

from __future__ import annotations

import array
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mdeploy.errors import MdeployError

Encoding = Literal["float", "base64"]
Item = str | Mapping[str, str]
"""One input: a text, or what a multimodal model takes: {"text", "image"}, the image as a data: URI."""

Vector = bytes | list[float]
"""Little-endian float32 where base64 was asked, else numbers as the server wrote them."""


@dataclass(frozen=True, slots=True)
class Server:
    """A service to ask. `url` may end in /v1 or not; `name` is what it is called here, empty for a URL."""

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    name: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """How texts are to be embedded; what is None or False is left to the service."""

    dimensions: int | None = None
    prompt_name: str | None = None
    instruction: str | None = None
    query: bool = False
    truncate: bool = False

    def fields(self) -> dict[str, Any]:
        """The members of a request that say so."""
        found = {
            "dimensions": self.dimensions,
            "prompt_name": self.prompt_name,
            "instruction": self.instruction,
            "input_type": "query" if self.query else None,
            "truncate": self.truncate or None,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Answer:
    """Vectors in the order of the inputs. `tokens` are the server's own count."""

    vectors: tuple[Vector, ...]
    tokens: int
    model: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one text has no vector."""

    reason: str


class RefusedError(MdeployError):
    """The server does not take one of the inputs, or all of them together. One alone can be told apart by asking."""


def numbers(vector: Vector) -> Sequence[float]:
    """A vector as numbers, however it came."""
    if not isinstance(vector, bytes):
        return vector
    found = array.array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def norm(vector: Sequence[float]) -> float:
    """The Euclidean length."""
    return math.sqrt(math.fsum(value * value for value in vector))


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors of the same size; NaN where one of them is zero."""
    scale = norm(one) * norm(other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / scale if scale else math.nan
