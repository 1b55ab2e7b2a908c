"""What travels between the edge and the workers of an embedding service: token ids there, vectors back.

A piece of work is some texts of one HTTP request, as little-endian uint32:

    dim, n, (length, second) of each of the n texts, then all their token ids

`dim` is how many numbers a vector shall have (0: all). `second` is where the second text of a pair begins, whose
tokens have type 1; it is 0 where there is only one. The answer is n x dim float32, row by row, each row of norm 1;
from a cross-encoder it is n float32, its raw scores. Nothing but the standard library.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mdeploy.serving.handler import Buffer


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text, or a pair: `ids` with the special tokens, `second` as above."""

    ids: Sequence[int]
    second: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """Some texts of one request."""

    texts: tuple[Tokens, ...]
    dim: int = 0

    @property
    def tokens(self) -> int:
        """What it costs."""
        return sum(len(text.ids) for text in self.texts)


def pack(texts: Iterable[Tokens], dim: int = 0) -> bytes:
    """Work as bytes."""
    texts = tuple(texts)
    words = array("I", (dim, len(texts)))
    for text in texts:
        words.extend((len(text.ids), text.second))
    for text in texts:
        words.extend(text.ids)
    return _little(words).tobytes()


def unpack(body: Buffer) -> Work:
    """The inverse of `pack`. Raises ValueError for bytes that are none."""
    words = array("I")
    words.frombytes(body)
    words = _little(words)
    if len(words) < 2 or len(words) < 2 + 2 * words[1]:
        raise ValueError("no packed texts")
    dim, count = words[0], words[1]
    start, texts = 2 + 2 * count, []
    for index in range(count):
        length, second = words[2 + 2 * index], words[3 + 2 * index]
        texts.append(Tokens(words[start : start + length], second))
        start += length
    if start != len(words):
        raise ValueError("packed texts are cut off")
    return Work(tuple(texts), dim)


def _little(words: array[int]) -> array[int]:
    if sys.byteorder == "big":
        words.byteswap()
    return words
