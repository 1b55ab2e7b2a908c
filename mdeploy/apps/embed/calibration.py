"""How many tokens a device should be asked at once: measured when a worker starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mdeploy.apps.embed.encoder import is_out_of_memory
from mdeploy.apps.embed.rows import Texts

CPU_BUDGETS = (512, 1024, 2048, 4096, 8192)
GPU_BUDGETS = (1024, 2048, 4096, 8192, 16384, 32768)
GOOD_ENOUGH = 0.97
"""A smaller batch is preferred, since its texts wait less, where it costs no more than this share of the rate."""

SHORT_S = 0.2
"""A batch that is done in this time need not be smaller: waiting for it is nothing, and a full one costs least."""

_HOPELESS = 0.85  # a budget this far below the best ends the search

_SAMPLE = 1 / 12
"""Share of the search's time that one measurement takes: several batches of a small budget, since none of them is
quite full."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A token budget, and tokens a second with it."""

    budget: int
    rate: float


def calibrate(
    ask: Callable[[Texts, int], object],
    budgets: Sequence[int],
    longest: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """The least of the budgets whose rate is about the best, or the largest of them whose batches are short.

    The search ends after so many seconds. `ask` is told the budget to cut its texts by, and returns when the answer is
    there. Running out of memory ends the search too, if any budget was possible.
    """
    trial = _Trial(ask, longest, clock)
    ends = clock() + seconds
    found: list[Measured] = []
    best = 0.0
    for budget in budgets:
        try:
            best = best or trial.rough(budget)
            sample = int(min(best * seconds * _SAMPLE, budgets[-1]))
            found.append(trial.measured(budget, sample))
        except (RuntimeError, MemoryError) as error:
            if not found or not is_out_of_memory(error):
                raise
            break
        best = max(one.rate for one in found)
        following = 2 * budget  # a first batch, then two samples
        if clock() + (following + 2 * max(following, sample)) / best > ends or found[-1].rate < _HOPELESS * best:
            break
    good = [one for one in found if one.rate >= GOOD_ENOUGH * best]
    short = [one for one in good if one.budget <= SHORT_S * one.rate]
    return short[-1] if short else good[0]


@dataclass(frozen=True, slots=True)
class _Trial:
    """One device while it is measured."""

    ask: Callable[[Texts, int], object]
    longest: int
    clock: Callable[[], float]

    def rough(self, budget: int) -> float:
        """Tokens a second, after the first call of all, which loads what it needs."""
        return max(self._rate(budget, budget, 0) for _ in range(2))

    def measured(self, budget: int, tokens: int) -> Measured:
        """The better of two rates; the first batch of a size is slow, since kernels are chosen for it."""
        self._rate(budget, budget, 0)
        return Measured(budget, max(self._rate(budget, max(budget, tokens), seed) for seed in (1, 2)))

    def _rate(self, budget: int, tokens: int, seed: int) -> float:
        texts = usual(tokens, self.longest, seed)
        began = self.clock()
        self.ask(texts, budget)
        return texts.tokens / max(self.clock() - began, 1e-9)


def usual(tokens: int, longest: int, seed: int = 0) -> Texts:
    """Texts of usual lengths (lognormal, 8 to 256 tokens) that fill a batch exactly."""
    drawn = np.random.default_rng(seed).lognormal(np.log(50), 0.8, tokens // 8 + 1)
    lengths = np.clip(drawn.astype(np.int64), 8, min(256, longest))
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, tokens)) + 1
    lengths = lengths[:count]
    lengths[-1] -= ends[count - 1] - tokens
    return Texts(lengths, np.zeros(count, np.int64), np.full(tokens, 5, np.int64))
