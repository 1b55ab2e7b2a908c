"""Audit and report on made-up runs, where every number is known."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from mdeploy.bench import plan, prompts, report
from mdeploy.bench.load import Outcome
from mdeploy.bench.stats import Histogram
from mdeploy.bench.types import BenchOptions, BenchResult, BenchTarget, LoadPlan, Sample
from mdeploy.bench.wire import CANCELLED, WorkerReport

S = 1_000_000_000
MS = 1_000_000
ZERO = 1_700_000_000 * S


def sample(begin_ms: int, end_ms: int, error: str | None = None, tokens: int = 11) -> Sample:
    """First token 50 ms after the start, last one at the end."""
    begin, end = ZERO + begin_ms * MS, ZERO + end_ms * MS
    return Sample(
        due_ns=begin,
        connect_ns=0,
        sent_ns=begin,
        ttfb_ns=begin + 50 * MS,
        first_ns=begin + 50 * MS,
        answer_ns=begin + 50 * MS,
        last_ns=end,
        end_ns=end,
        prompt_tokens=256,
        output_tokens=tokens,
        chunks=11,
        first_coalesced=False,
        error=error,
    )


def work(**options: float) -> LoadPlan:
    asked = BenchOptions(**{"concurrency": 1, "output_tokens": 11, **options})  # type: ignore[arg-type]
    target = BenchTarget("http://127.0.0.1:1")
    return plan.build(target, "m", asked, prompts.build(256, 0, None), (2, ("127.0.0.1", 1)), ignore_eos=True)


def worker(samples: list[Sample], drain_ms: int, end_ms: int) -> WorkerReport:
    return WorkerReport(
        start_ns=ZERO,
        drain_ns=ZERO + drain_ms * MS,
        end_ns=ZERO + end_ms * MS,
        samples=samples,
        gaps=Histogram(),
        lag=Histogram(),
        cpu_share=0.1,
        reads=100,
        unstamped_reads=0,
        coalesced_reads=0,
        gaps_omitted=0,
        checked=10,
        mismatches=0,
        clock_step_ns=0,
        realtime=False,
    )


def judge(*reports: WorkerReport, interrupted: bool = False, **options: float) -> BenchResult:
    return report.result(work(**options), Outcome(reports, interrupted), {})


STEADY = [sample(i * 100, i * 100 + 100) for i in range(10)]


def test_a_steady_run_is_valid_and_its_rates_are_exact() -> None:
    result = judge(worker(STEADY, 1000, 1000), duration_s=1)
    assert result.audit.valid, result.audit.reasons
    rates = result.throughput
    assert rates.requests_per_s == pytest.approx(10)
    assert rates.output_tokens_per_s == pytest.approx(110)
    assert rates.input_tokens_per_s == pytest.approx(2560)
    assert result.audit.achieved == pytest.approx(1)
    assert result.latency_ms["ttft"].p50 == pytest.approx(50)
    assert result.latency_ms["tpot"].p50 == pytest.approx(5)
    assert result.latency_ms["e2e"].p50 == pytest.approx(100)


def test_a_request_across_the_end_counts_by_its_part_inside() -> None:
    """Ten slots of 20 s each, 30 s measured: 0.5 requests/s, not 10/30."""
    samples = [sample(begin, begin + 20_000) for begin in (0, 20_000) for _ in range(10)]
    result = judge(worker(samples, 30_000, 40_000), concurrency=10, duration_s=30)
    assert result.requests.completed == 20
    assert result.throughput.requests_per_s == pytest.approx(0.5)
    assert result.audit.achieved == pytest.approx(1)


def test_a_request_in_the_drain_counts_in_no_rate() -> None:
    result = judge(worker([*STEADY, sample(1000, 1100)], 1000, 1100), duration_s=1)
    assert result.throughput.requests_per_s == pytest.approx(10)
    assert result.requests.completed == 11


def test_a_run_that_is_all_drain_is_taken_whole() -> None:
    samples = [sample(0, 100 + i) for i in range(4)]
    result = judge(worker(samples, 1, 104), concurrency=4, requests=4)
    assert result.throughput.window == "whole"
    assert result.throughput.window_s == pytest.approx(0.104)


def test_no_request_completed() -> None:
    result = judge(worker([sample(0, 100, "reset")], 100, 100), duration_s=1)
    assert not result.audit.valid
    assert "no request completed" in result.audit.reasons
    assert result.throughput.requests_per_s is None
    assert result.requests.by_error == {"reset": 1}
    assert report.human(result)


@pytest.mark.parametrize(("failed", "valid"), [(5, True), (6, False)])
def test_more_than_five_percent_failures_make_it_invalid(failed: int, valid: bool) -> None:
    samples = [sample(i * 10, i * 10 + 10, "timeout" if i < failed else None) for i in range(100)]
    result = judge(worker(samples, 1000, 1000), duration_s=1)
    assert result.audit.valid is valid
    assert (result.requests.completed, result.requests.failed) == (100 - failed, failed)


@pytest.mark.parametrize(("lag_ms", "ttft_ms", "valid"), [(0.9, 50, True), (1.1, 50, False), (1.9, 100, True)])
def test_the_lag_rule(lag_ms: float, ttft_ms: int, valid: bool) -> None:
    samples = [replace(s, first_ns=s.sent_ns + ttft_ms * MS) for s in STEADY]
    lagging = worker(samples, 1000, 1000)
    for _ in range(100):
        lagging.lag.add(int(lag_ms * MS))
    result = judge(lagging, duration_s=1)
    assert result.audit.valid is valid
    assert result.audit.client_lag_ms.p50 == pytest.approx(lag_ms, rel=0.001)


def test_lateness_leaves_the_connection_out() -> None:
    late = [replace(s, due_ns=s.sent_ns - 5 * MS, connect_ns=3 * MS) for s in STEADY]
    assert judge(worker(late, 1000, 1000), duration_s=1).audit.send_lateness_ms.p50 == pytest.approx(2)


def test_a_load_that_was_not_reached() -> None:
    result = judge(worker(STEADY, 1000, 1000), concurrency=2, duration_s=1)
    assert result.audit.achieved == pytest.approx(0.5)
    assert any("in flight" in reason for reason in result.audit.reasons)


def test_clock_steps_and_misread_chunks_make_it_invalid() -> None:
    for wrong in ({"clock_step_ns": 2 * MS}, {"mismatches": 1}):
        result = judge(replace(worker(STEADY, 1000, 1000), **wrong), duration_s=1)  # type: ignore[arg-type]
        assert len(result.audit.reasons) == 1


def test_notes_do_not_make_it_invalid() -> None:
    noted = replace(
        worker([replace(s, first_coalesced=True, output_tokens=5) for s in STEADY], 1000, 1000),
        unstamped_reads=50,
        cpu_share=0.95,
        gaps_omitted=9,
    )
    audit = judge(noted, duration_s=1).audit
    assert audit.valid
    assert audit.timestamps == "user"
    assert len(audit.notes) == 5


def test_tokens_are_unknown_without_usage() -> None:
    silent = [*STEADY[1:], sample(0, 100, tokens=-1)]
    result = judge(worker(silent, 1000, 1000), duration_s=1)
    assert result.tokens.reason == "1 of 10 answers came without usage"
    assert result.tokens.output_total is None
    assert result.throughput.output_tokens_per_s is None
    assert result.throughput.requests_per_s == pytest.approx(10)
    assert result.latency_ms["tpot"].count == 9


def test_what_an_interrupt_cut_off_is_nobodys_failure() -> None:
    result = judge(worker([*STEADY, sample(1000, 1040, CANCELLED)], 1040, 1040), interrupted=True)
    assert (result.requests.failed, result.requests.cancelled) == (0, 1)
    assert result.audit.valid
    assert result.audit.achieved == pytest.approx(1)
    assert result.interrupted


def test_workers_add_up() -> None:
    result = judge(worker(STEADY, 1000, 1000), worker(STEADY, 1000, 1000), concurrency=2, duration_s=1)
    assert result.throughput.requests_per_s == pytest.approx(20)
    assert result.audit.valid


def test_the_contract() -> None:
    document = orjson.loads(orjson.dumps(report.document(judge(worker(STEADY, 1000, 1000), duration_s=1))))
    assert {"workload", "requests", "throughput", "latency_ms", "audit", "environment"} <= set(document)
    assert "hash" in document["workload"]
    assert {"completed", "failed", "by_error"} <= set(document["requests"])
    assert {"requests_per_s", "output_tokens_per_s"} <= set(document["throughput"])
    assert set(document["latency_ms"]) == {"ttfb", "ttft", "ttfo", "tpot", "inter_chunk", "e2e"}
    for row in document["latency_ms"].values():
        assert {"mean", "p50", "p90", "p99", "p999"} <= set(row)
    audit = {"valid", "reasons", "client_lag_ms", "send_lateness_ms", "achieved", "worker_cpu"}
    assert audit <= set(document["audit"])
    assert document["latency_ms"]["ttft"]["p99"] is None


def test_the_table_fits_eighty_columns() -> None:
    failures = [sample(i * 100, i * 100 + 100, "error_in_stream") for i in range(10)]
    bad = replace(worker([*STEADY, *failures], 1000, 1000), clock_step_ns=9 * S, unstamped_reads=99)
    text = report.human(judge(bad, duration_s=1))
    assert max(map(len, text.splitlines())) <= 80
    for word in ("INVALID", "10 x error_in_stream", "TTFT", "requests/s", "ms"):
        assert word in text
