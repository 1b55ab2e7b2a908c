"""Judges the measurement itself: is this the server's time, or ours?

A run is invalid when the client was late, the load was not what was asked for, the clock was moved,
or too many requests failed for the rest to stand for the server. Everything it judges by is printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mdeploy.bench.load import Outcome
from mdeploy.bench.stats import Histogram, merged, summarize
from mdeploy.bench.types import BenchAudit, LoadPlan, Percentiles, Sample
from mdeploy.bench.wire import CANCELLED

LAG_FLOOR_MS = 1.0
LAG_SHARE_OF_TTFT = 0.02
MOST_FAILED = 0.05
LEAST_ACHIEVED = 0.9
CLOCK_STEP_MS = 1.0
BUSY_WORKER = 0.85
_MOST_UNSTAMPED = 0.01
_MOST_COALESCED = 0.01


def judge(
    plan: LoadPlan,
    outcome: Outcome,
    samples: Sequence[Sample],
    window: tuple[int, int],
    latency_ms: dict[str, Percentiles],
) -> BenchAudit:
    """The audit of one run; `window` is the steady part in Unix ns."""
    reports = outcome.reports
    lag = merged(report.lag for report in reports)
    step_ms = max((report.clock_step_ns for report in reports), default=0) / 1e6
    achieved = _achieved(samples, window, plan.concurrency)
    reasons = (
        *_requests_reasons(samples),
        *_lag_reasons(lag, latency_ms["ttfb" if plan.endpoint == "http" else "ttft"].p50),
        *_achieved_reasons(achieved, plan.concurrency),
        *_client_reasons(step_ms, sum(report.mismatches for report in reports)),
    )
    unstamped = sum(report.unstamped_reads for report in reports)
    stamped = unstamped <= _MOST_UNSTAMPED * sum(report.reads for report in reports)
    cpu = max((report.cpu_share for report in reports), default=0.0)
    return BenchAudit(
        valid=not reasons,
        reasons=reasons,
        notes=tuple(_notes(plan, outcome, samples, stamped=stamped, cpu=cpu)),
        client_lag_ms=lag.summarize_ms(),
        send_lateness_ms=summarize([_lateness_ms(sample) for sample in samples if sample.sent_ns]),
        achieved=achieved,
        worker_cpu=cpu,
        timestamps="kernel" if stamped else "user",
        coalesced_reads=sum(report.coalesced_reads for report in reports),
        clock_step_ms=step_ms,
    )


def _lateness_ms(sample: Sample) -> float:
    """From the moment a place became free to the request's first byte, opening a connection left out."""
    return (sample.sent_ns - sample.due_ns - sample.connect_ns) / 1e6


def _achieved(samples: Sequence[Sample], window: tuple[int, int], target: int) -> float | None:
    """Mean number of requests in flight within the window, over the number asked for."""
    start, end = window
    if end <= start:
        return None
    busy = sum(max(0, min(sample.end_ns, end) - max(sample.sent_ns or sample.end_ns, start)) for sample in samples)
    return busy / (end - start) / target


def _requests_reasons(samples: Sequence[Sample]) -> Iterator[str]:
    ended = [sample for sample in samples if sample.error != CANCELLED]
    failed = sum(sample.error is not None for sample in ended)
    if failed == len(ended):
        yield "no request completed"
    elif failed > MOST_FAILED * len(ended):
        yield f"{failed} of {len(ended)} requests failed, more than {MOST_FAILED:.0%}"


def _lag_reasons(lag: Histogram, first_p50_ms: float | None) -> Iterator[str]:
    if not lag.count or first_p50_ms is None:
        return
    limit_ms = max(LAG_FLOOR_MS, LAG_SHARE_OF_TTFT * first_p50_ms)
    lag_ms = lag.quantile_ns(0.99) / 1e6
    if lag_ms > limit_ms:
        yield f"client lag p99 {lag_ms:.2f} ms is over {limit_ms:.2f} ms: this client was too busy"


def _achieved_reasons(achieved: float | None, target: int) -> Iterator[str]:
    if achieved is not None and achieved < LEAST_ACHIEVED:
        yield f"{achieved * target:.1f} requests were in flight on average, not {target}"


def _client_reasons(step_ms: float, mismatches: int) -> Iterator[str]:
    if step_ms > CLOCK_STEP_MS:
        yield f"this machine's clock was set by {step_ms:.1f} ms during the run"
    if mismatches:
        yield f"{mismatches} chunks were misread as tokens: please report this server's chunk format"


def _notes(plan: LoadPlan, outcome: Outcome, samples: Sequence[Sample], *, stamped: bool, cpu: float) -> Iterator[str]:
    done = [sample for sample in samples if sample.error is None]
    if not stamped:
        yield "no kernel timestamps here: client lag is a lower bound"
    if cpu > BUSY_WORKER:
        yield f"the busiest load process used {cpu:.0%} of a core: add --workers"
    bounds = sum(sample.first_coalesced for sample in done)
    if bounds > _MOST_COALESCED * len(done):
        yield f"TTFT of {bounds} requests is an upper bound: their first chunks arrived together"
    yield from _gap_notes(outcome)
    yield from _length_notes(plan, done)


def _gap_notes(outcome: Outcome) -> Iterator[str]:
    omitted = sum(report.gaps_omitted for report in outcome.reports)
    kept = sum(report.gaps.count for report in outcome.reports)
    if omitted > _MOST_COALESCED * (omitted + kept):
        yield f"inter_chunk leaves out {omitted} of {omitted + kept} gaps: chunks arrived together"


def _length_notes(plan: LoadPlan, done: Sequence[Sample]) -> Iterator[str]:
    if plan.endpoint == "http":
        return
    wanted_in, wanted_out = plan.workload["input_tokens"], plan.workload["output_tokens"]
    known = [sample for sample in done if sample.output_tokens >= 0]
    other = sum(sample.output_tokens != wanted_out for sample in known)
    if other:
        yield f"{other} answers were not {wanted_out} tokens long"
    if plan.workload["input_tokens_exact"]:
        wrong = sum(sample.prompt_tokens != wanted_in for sample in known if sample.prompt_tokens >= 0)
        if wrong:
            yield f"the server counted other than {wanted_in} prompt tokens in {wrong} requests"
