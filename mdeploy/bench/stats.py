"""Percentiles that know how many values they need, and the histogram workers send home."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mdeploy.bench.types import Percentiles

NEEDED = {"p50": 1, "p90": 44, "p99": 460, "p999": 4600}
"""Smallest sample for a percentile q: the largest of n values exceeds q with 99 % probability,
n = ln 0.01 / ln q (44, 459, 4603; the last two rounded). Below it the figure would be the luck of the
maximum. A median is a description of any sample, so it is always given."""

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
_SUB_BITS = 10


def summarize(values: Sequence[float]) -> Percentiles:
    """Mean and percentiles of values in any unit, linear interpolation between order statistics."""
    ordered = sorted(values)
    count = len(ordered)
    mean = math.fsum(ordered) / count if count else None
    figures = {
        name: _interpolate(ordered, _QUANTILES[name]) if count >= needed else None for name, needed in NEEDED.items()
    }
    return Percentiles(count=count, mean=mean, **figures)


def _interpolate(ordered: Sequence[float], quantile: float) -> float:
    """Hyndman and Fan's type 7, what numpy calls `linear`."""
    place = quantile * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Histogram:
    """Durations in log-linear buckets (HDR): 1024 a doubling, so a value is off by 0.05 % at most.

    Its size depends on the spread of the values, never on their number, and two of them add up.
    """

    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0

    def add(self, ns: int) -> None:
        """Count one duration in nanoseconds; a negative one is a clock's noise and counts as 0."""
        if ns < 0:
            ns = 0
        shift = ns.bit_length() - _SUB_BITS - 1
        key = (shift << _SUB_BITS + 1) | (ns >> shift) if shift > 0 else ns
        self.buckets[key] = self.buckets.get(key, 0) + 1
        self.count += 1
        self.total += ns

    def merge(self, other: Histogram) -> None:
        """Add what another worker counted."""
        for key, number in other.buckets.items():
            self.buckets[key] = self.buckets.get(key, 0) + number
        self.count += other.count
        self.total += other.total

    def quantile_ns(self, quantile: float) -> float:
        """The value below which `quantile` of the counts lie; raises ValueError when empty."""
        wanted = max(1, math.ceil(quantile * self.count))
        for key in sorted(self.buckets):
            wanted -= self.buckets[key]
            if wanted <= 0:
                return _middle(key)
        raise ValueError("an empty histogram has no quantiles")

    def summarize_ms(self) -> Percentiles:
        """Mean and percentiles in milliseconds."""
        mean = self.total / self.count / 1e6 if self.count else None
        figures = {
            name: self.quantile_ns(_QUANTILES[name]) / 1e6 if self.count >= needed else None
            for name, needed in NEEDED.items()
        }
        return Percentiles(count=self.count, mean=mean, **figures)


def _middle(key: int) -> float:
    shift = key >> _SUB_BITS + 1
    mantissa = key & ((2 << _SUB_BITS) - 1)
    return (mantissa << shift) + ((1 << shift) - 1) / 2


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All of them as one."""
    whole = Histogram()
    for histogram in histograms:
        whole.merge(histogram)
    return whole


def count_by(names: Iterable[str]) -> Mapping[str, int]:
    """How often each name occurs, the most frequent first, ties by name."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
