"""Texts of several requests as arrays: joined, put in order and cut into rows without a step for each text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdeploy.serving.handler import Buffer

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of n texts, one behind the other: `lengths` [n], `seconds` [n] as in `work`, `ids` [sum of lengths]."""

    lengths: Ints
    seconds: Ints
    ids: Ints
    dim: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return len(self.ids)


def unpack(body: Buffer) -> Texts:
    """What `work.pack` made, as arrays. Raises ValueError for bytes that are none."""
    if len(body) % 4 or len(body) < 8:
        raise ValueError("no packed texts")
    words = np.frombuffer(body, "<u4").astype(np.int64)
    dim, count = int(words[0]), int(words[1])
    heads = words[2 : 2 + 2 * count]
    lengths, seconds, ids = heads[::2], heads[1::2], words[2 + 2 * count :]
    if len(heads) != 2 * count or not count or lengths.min() < 1 or int(lengths.sum()) != len(ids):
        raise ValueError("packed texts are empty or cut off")
    return Texts(lengths, seconds, ids, dim)


def joined(several: Sequence[Texts]) -> Texts:
    """All of them as one."""
    if len(several) == 1:
        return several[0]
    return Texts(
        np.concatenate([one.lengths for one in several]),
        np.concatenate([one.seconds for one in several]),
        np.concatenate([one.ids for one in several]),
    )


def taken(texts: Texts, order: NDArray[Any]) -> Texts:
    """The texts at these places, in this order."""
    lengths = texts.lengths[order]
    begins = np.cumsum(texts.lengths) - texts.lengths
    ends = np.cumsum(lengths)
    places = np.repeat(begins[order] - (ends - lengths), lengths) + np.arange(ends[-1])
    return Texts(lengths, texts.seconds[order], texts.ids[places], texts.dim)


def cut(texts: Texts, most: float) -> Iterator[Texts]:
    """Rows of at most so many tokens, in order; a text that is longer has a row of its own."""
    ends = np.cumsum(texts.lengths)
    first = 0
    while first < len(texts):
        before = ends[first] - texts.lengths[first]
        after = max(first + 1, int(np.searchsorted(ends, before + most, "right")))
        yield _part(texts, first, after)
        first = after


def cut_padded(texts: Texts, most: float) -> Iterator[Texts]:
    """The same where each text of a row takes as much as the longest; they come in the order of their lengths."""
    first = 0
    while first < len(texts):
        sizes = texts.lengths[first:] * np.arange(1, len(texts) - first + 1)
        after = max(first + 1, first + int(np.searchsorted(sizes, most, "right")))
        yield _part(texts, first, after)
        first = after


def _part(texts: Texts, first: int, after: int) -> Texts:
    begin = int(texts.lengths[:first].sum())
    end = begin + int(texts.lengths[first:after].sum())
    return Texts(texts.lengths[first:after], texts.seconds[first:after], texts.ids[begin:end], texts.dim)


def places(texts: Texts, padding: int) -> Ints:
    """Of each token among those of its text that are not `padding`, from 1 on; 0 for `padding` itself, [T]."""
    is_counted = texts.ids != padding
    counted = np.cumsum(is_counted)
    before = counted - is_counted
    starts = np.cumsum(texts.lengths) - texts.lengths
    return np.where(is_counted, counted - np.repeat(before[starts], texts.lengths), 0)


def types(texts: Texts) -> Ints:
    """0 for tokens of a first text, 1 for those of a second one, [T]."""
    if not texts.seconds.any():
        return np.zeros(texts.tokens, np.int64)
    place = np.arange(texts.tokens) - np.repeat(np.cumsum(texts.lengths) - texts.lengths, texts.lengths)
    border = np.where(texts.seconds > 0, texts.seconds, sys.maxsize)
    return (place >= np.repeat(border, texts.lengths)).astype(np.int64)
