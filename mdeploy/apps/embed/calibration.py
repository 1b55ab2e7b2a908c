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

_HOPELESS = 0.85  # a budget this far below the best ends the search


@dataclass(frozen=True, slots=True)
class Measured:
    """A token budget, and tokens a second with it."""

    budget: int
    rate: float


def calibrate(
    ask: Callable[[Texts], object],
    budgets: Sequence[int],
    longest: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """The least of the budgets whose rate is about the best; the search ends after so many seconds.

    `ask` returns when the answer is there. Running out of memory ends the search too, if any budget was possible.
    """
    ends = clock() + seconds
    found: list[Measured] = []
    for budget in budgets:
        try:
            found.append(_measured(ask, budget, longest, clock))
        except (RuntimeError, MemoryError) as error:
            if not found or not is_out_of_memory(error):
                raise
            break
        best = max(one.rate for one in found)
        next_s = 3 * 2 * budget / best  # three batches of the next size
        if clock() + next_s > ends or found[-1].rate < _HOPELESS * best:
            break
    return next(one for one in found if one.rate >= GOOD_ENOUGH * max(one.rate for one in found))


def _measured(ask: Callable[[Texts], object], budget: int, longest: int, clock: Callable[[], float]) -> Measured:
    """The better of two rates; the first batch of a size is slow, since kernels are chosen for it."""
    rates = []
    for seed in (0, 0, 1):
        texts = usual(budget, longest, seed)
        began = clock()
        ask(texts)
        rates.append(texts.tokens / max(clock() - began, 1e-9))
    return Measured(budget, max(rates[1:]))


def usual(tokens: int, longest: int, seed: int = 0) -> Texts:
    """Texts of usual lengths (lognormal, 8 to 256 tokens) that fill a batch exactly."""
    drawn = np.random.default_rng(seed).lognormal(np.log(50), 0.8, tokens // 8 + 1)
    lengths = np.clip(drawn.astype(np.int64), 8, min(256, longest))
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, tokens)) + 1
    lengths = lengths[:count]
    lengths[-1] -= ends[count - 1] - tokens
    return Texts(lengths, np.zeros(count, np.int64), np.full(tokens, 5, np.int64))
