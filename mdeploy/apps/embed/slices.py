"""Tokenising without holding anybody up: what is short in the event loop, the rest in threads, a slice at a time.

Short texts take less time than handing them to a thread would. A slice is small, so a large request holds up nobody;
the tokenizer lets go of the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mdeploy.apps.embed import fields

_INLINE = 2_000
"""Characters that are tokenised in about half a millisecond, in the event loop."""

_SLICE = 100_000
"""Characters that one task of a thread has, about 30 ms."""

_THREADS = 4

_REPEATED = 16 << 20
"""Characters that a prompt may become by being put before every input, some 8 seconds of a thread."""

CHARACTERS_A_TOKEN = 32
"""A text of more characters than so many for each token it may have is not looked at.

It could only fit if it were blanks; to count its tokens would take as long as the client likes."""

T = TypeVar("T")


class Slices:
    """The threads of one tokenizer."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "tokenise")

    async def run(self, lengths: Sequence[int], encode: Callable[[int, int], list[T]]) -> list[T]:
        """What `encode(start, end)` makes of inputs of so many characters, in their order."""
        if sum(lengths) <= _INLINE:
            return encode(0, len(lengths))
        loop = asyncio.get_running_loop()
        found: list[T] = []
        for start, end in _slices(lengths):
            found += await loop.run_in_executor(self._threads, encode, start, end)
        return found


def check_repeated(size: int, count: int, param: str) -> None:
    """Raises HTTPError 400 where a few characters of a body would become far too many."""
    if size * count > _REPEATED:
        text = f"is too much: a prompt of {size} characters goes with each of {count}, together {_REPEATED} are taken"
        fields.wrong(param, text, "context_length_exceeded")


def _slices(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that are about one slice long."""
    start = total = 0
    for index, length in enumerate(lengths):
        if total and total + length > _SLICE:
            yield start, index
            start, total = index, 0
        total += length
    yield start, len(lengths)
