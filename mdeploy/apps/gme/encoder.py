"""Inputs to vectors, in whatever number they come; and which way the model is asked, found out at start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mdeploy.apps.embed import attention, selfcheck
from mdeploy.apps.embed.encoder import free_memory, is_out_of_memory
from mdeploy.apps.embed.loading import say
from mdeploy.apps.gme.model import Model
from mdeploy.apps.gme.prompt import TILE
from mdeploy.apps.gme.work import Input, Picture
from mdeploy.serving.load import LoadError

_TEXTS = (5, 17, 40)
_PICTURES = ((6, 4), (3, 9))
"""Rows and columns of tokens: too small for GME, large enough to see whether places are right."""


class Encoder:
    """A model and how many tokens it is asked at once, `budget`."""

    def __init__(self, model: Model, budget: float) -> None:
        self.model, self.budget = model, budget

    def encode(self, inputs: Sequence[Input], *, halves: bool = True) -> NDArray[np.float32]:
        """Float32 [n, hidden], in the order of the inputs. Raises what the model raises.

        A row that is too large for the device's memory is asked in halves, if that is wanted.
        """
        ask = self._asked if halves else lambda row: iter([self.model.pooled(row)])
        with torch.inference_mode():
            found = [part for row in self._rows(inputs) for part in ask(row)]
            return np.asarray(torch.cat(found).cpu().numpy(), np.float32)

    def _rows(self, inputs: Sequence[Input]) -> Iterator[Sequence[Input]]:
        """Neighbours of at most `budget` tokens together, padding too; one that has more is alone."""
        is_padded = self.model.way == "padded"
        start, total, longest = 0, 0, 0
        for index, each in enumerate(inputs):
            size = len(each.ids)
            total, longest = total + size, max(longest, size)
            if index > start and ((index - start + 1) * longest if is_padded else total) > self.budget:
                yield inputs[start:index]
                start, total, longest = index, size, size
        yield inputs[start:]

    def _asked(self, row: Sequence[Input]) -> Iterator[torch.Tensor]:
        """One row, in halves where the device's memory is too small for it."""
        try:
            yield self.model.pooled(row)
            return
        except (RuntimeError, MemoryError) as error:
            if len(row) == 1 or not is_out_of_memory(error):
                raise
        free_memory()  # what the failed forward left would make the next one fail too
        half = len(row) // 2
        yield from self._asked(row[:half])
        yield from self._asked(row[half:])


def choose(model: Model, image_token: int, asked: Literal["auto", "packed", "padded"]) -> None:
    """Packed where it agrees with one input at a time, padded else. Raises LoadError where neither does."""
    with torch.inference_mode():
        inputs = sample(image_token)
        model.use("padded")
        alone = torch.cat([model.single(each) for each in inputs])

        def repeated(copies: int) -> torch.Tensor:
            return torch.cat([model.single(each, copies)[-1:] for each in inputs])

        least = selfcheck.least(model.dtype, repeated, alone)
        if asked != "padded":
            why = _why_not_packed(model, inputs, alone, least)
            if not why:
                return
            if asked == "packed":
                raise LoadError(f"this model cannot be packed: {why}; --attention auto pads its inputs")
            say(f"inputs are padded, which is slower: {why}")
            model.use("padded")
        worst = selfcheck.cosine(model.pooled(inputs), alone)
        if not worst >= least:  # NaN too
            raise LoadError(f"this model gives other vectors in a batch than alone: their cosine is {worst:.5f}")


def _why_not_packed(model: Model, inputs: Sequence[Input], alone: torch.Tensor, least: float) -> str:
    if not attention.can_pack(str(model.device), model.dtype):
        return f"no kernel for {str(model.dtype).removeprefix('torch.')} on this device packs them"
    try:
        model.use("packed")
        worst = selfcheck.cosine(model.pooled(inputs), alone)
    except (attention.UnsupportedError, TypeError, ValueError, RuntimeError, AttributeError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "" if worst >= least else f"packed and single vectors have cosine {worst:.5f}, {least:.4g} is expected"


def sample(image_token: int) -> list[Input]:
    """Texts and pictures of several sizes, always the same; ids that every vocabulary has."""
    chance = np.random.default_rng(7)
    inputs = [Input(_words(chance, length)) for length in _TEXTS]
    for rows, columns in _PICTURES:
        before, after = _words(chance, 4), _words(chance, 6)
        inputs.append(Input([*before, *[image_token] * (rows * columns), *after], noise(chance, rows, columns)))
    return inputs[::2] + inputs[1::2]


def noise(chance: np.random.Generator, rows: int, columns: int) -> Picture:
    """A picture of so many tokens."""
    pixels = chance.integers(0, 256, rows * columns * TILE * TILE * 3, np.uint8)
    return Picture(rows * TILE, columns * TILE, pixels.tobytes())


def _words(chance: Any, count: int) -> list[int]:
    return [int(word) for word in chance.integers(10, 200, count)]
