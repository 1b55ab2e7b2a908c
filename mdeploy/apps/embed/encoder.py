"""Texts to vectors or scores, in whatever number they come: sorted, cut into rows, asked, put back in order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mdeploy.apps.embed import rows
from mdeploy.apps.embed.forward import Forward
from mdeploy.apps.embed.rows import Texts
from mdeploy.serving import answers

Floats = NDArray[np.float32]


class Encoder:
    """A model and how many tokens it is asked at once, `budget`."""

    def __init__(self, forward: Forward, budget: float) -> None:
        self.forward, self.budget = forward, budget

    @torch.inference_mode()  # type: ignore[untyped-decorator] # torch has no types here
    def encode(self, texts: Texts, *, halves: bool = True) -> Floats:
        """Float32 [n, k], in the order of the texts. Raises what the model raises.

        A row that is too large for the device's memory is asked in halves, if that is wanted.
        """
        order = np.argsort(texts.lengths, kind="stable")
        cut = rows.cut_padded if self.forward.name == "padded" else rows.cut
        found = [
            part
            for row in cut(rows.taken(texts, order), self.budget)
            for part in (self._asked(row) if halves else [self.forward(row)])
        ]
        results = np.empty((len(texts), found[0].shape[1]), np.float32)
        results[order] = torch.cat(found).cpu().numpy()
        return results

    def _asked(self, row: Texts) -> Iterator[torch.Tensor]:
        """One row, in halves where the device's memory is too small for it."""
        try:
            yield self.forward(row)
            return
        except (RuntimeError, MemoryError) as error:
            if len(row) == 1 or not is_out_of_memory(error):
                raise
        free_memory()  # what the failed forward left would make the next one fail too
        for half in np.array_split(np.arange(len(row)), 2):
            yield from self._asked(rows.taken(row, half))


def free_memory() -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer tokens may help; a CPU says it in words of its own."""
    return answers.is_out_of_memory(error) or "can't allocate memory" in str(error)


def normalized(vectors: Floats, dim: int) -> Floats:
    """The first `dim` numbers of each vector (0: all), then norm 1; NaN where the norm is 0 or beyond float32."""
    kept = vectors[:, :dim] if dim else vectors
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        norms = np.linalg.norm(kept, axis=1, keepdims=True)
        return np.asarray(kept / np.where(np.isfinite(norms), norms, np.nan), np.float32)
