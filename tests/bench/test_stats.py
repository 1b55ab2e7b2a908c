from __future__ import annotations

import random
import statistics

import pytest

from mdeploy.bench.stats import Histogram, count_by, merged, summarize


def test_nothing_has_no_figures() -> None:
    empty = summarize([])
    assert (empty.count, empty.mean, empty.p50, empty.p90, empty.p99, empty.p999) == (0, *[None] * 5)
    assert Histogram().summarize_ms() == empty


@pytest.mark.parametrize(
    ("count", "missing"),
    [
        (1, {"p90", "p99", "p999"}),
        (43, {"p90", "p99", "p999"}),
        (44, {"p99", "p999"}),
        (459, {"p99", "p999"}),
        (460, {"p999"}),
        (4599, {"p999"}),
        (4600, set()),
    ],
)
def test_a_sample_gives_only_the_percentiles_it_can_bear(count: int, missing: set[str]) -> None:
    histogram = Histogram()
    for value in range(count):
        histogram.add(value)
    for summary in (summarize(list(range(count))), histogram.summarize_ms()):
        figures = {name: getattr(summary, name) for name in ("p50", "p90", "p99", "p999")}
        assert {name for name, value in figures.items() if value is None} == missing


def test_percentiles_agree_with_the_standard_library() -> None:
    values = random.Random(1).sample(range(100_000), 5000)
    cuts = statistics.quantiles(values, n=1000, method="inclusive")
    summary = summarize(values)
    assert (summary.p50, summary.p90, summary.p99, summary.p999) == pytest.approx(
        (cuts[499], cuts[899], cuts[989], cuts[998])
    )
    assert summary.mean == pytest.approx(statistics.fmean(values))


def test_histogram_is_right_to_half_a_per_mille_and_merges() -> None:
    chooser = random.Random(2)
    values = [int(chooser.lognormvariate(16, 1)) for _ in range(6000)]
    parts = [Histogram(), Histogram()]
    for index, value in enumerate(values):
        parts[index % 2].add(value)
    whole = merged(parts)
    ordered = sorted(values)
    for quantile in (0.5, 0.9, 0.99, 1.0):
        exact = ordered[round(quantile * 6000) - 1]
        assert whole.quantile_ns(quantile) == pytest.approx(exact, rel=0.0006)
    assert (whole.count, whole.total) == (6000, sum(values))


def test_histogram_takes_zero_and_noise_below_it() -> None:
    histogram = Histogram()
    histogram.add(0)
    histogram.add(-5)
    assert (histogram.count, histogram.total, histogram.quantile_ns(1.0)) == (2, 0, 0)


def test_counts_the_frequent_first() -> None:
    assert list(count_by(["b", "a", "c", "a"]).items()) == [("a", 2), ("b", 1), ("c", 1)]
