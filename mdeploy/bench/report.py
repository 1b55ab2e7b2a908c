"""From samples to a `BenchResult`, and from that to the JSON contract or a table for people."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdeploy import __version__
from mdeploy.bench import audit
from mdeploy.bench.load import Outcome
from mdeploy.bench.stats import count_by, merged, summarize
from mdeploy.bench.types import BenchRequests, BenchResult, BenchThroughput, BenchTokens, LoadPlan, Percentiles, Sample
from mdeploy.bench.wire import CANCELLED

# A window shorter than this part of the run is mostly start and end; the whole run is used instead.
_LEAST_STEADY = 0.5
_LABELS = {
    "ttfb": "first byte (TTFB)",
    "ttft": "first token (TTFT)",
    "ttfo": "first answer token (TTFO)",
    "tpot": "per output token (TPOT)",
    "inter_chunk": "between chunks",
    "e2e": "whole request (E2E)",
}


_NO_TOKENS = BenchTokens(None, None, None, None, None, "plain requests have none")
_OF_TOKENS = ("ttft", "ttfo", "tpot", "inter_chunk")


def result(plan: LoadPlan, outcome: Outcome, environment: Mapping[str, Any]) -> BenchResult:
    """Everything a run says. `environment` is what the server told of itself."""
    samples = [sample for report in outcome.reports for sample in report.samples]
    done = [sample for sample in samples if sample.error is None]
    start = min(report.start_ns for report in outcome.reports)
    end = max(report.end_ns for report in outcome.reports)
    window, kind = _window(plan, outcome, start, end)
    latency_ms = latencies(done, outcome)
    tokens = _NO_TOKENS if plan.endpoint == "http" else count_tokens(done)
    return BenchResult(
        target=plan.base_url,
        started=start / 1e9,
        seconds=(end - start) / 1e9,
        interrupted=outcome.interrupted,
        workload=plan.workload,
        requests=_requests(samples),
        tokens=tokens,
        throughput=_throughput(done, window, kind, counted=not tokens.reason),
        latency_ms=latency_ms,
        audit=audit.judge(plan, outcome, samples, window, latency_ms),
        environment={**_client(), "realtime": all(r.realtime for r in outcome.reports), **environment},
    )


def _window(plan: LoadPlan, outcome: Outcome, start: int, end: int) -> tuple[tuple[int, int], Any]:
    """The part of the run in which the load was complete: until the first worker had no more to start."""
    drain = min(report.drain_ns for report in outcome.reports)
    if plan.requests is not None and drain - start < _LEAST_STEADY * (end - start):
        return (start, end), "whole"
    return (start, drain), "steady"


def _requests(samples: Sequence[Sample]) -> BenchRequests:
    errors = [sample.error for sample in samples if sample.error is not None]
    failures = [error for error in errors if error != CANCELLED]
    return BenchRequests(
        completed=len(samples) - len(errors),
        failed=len(failures),
        cancelled=len(errors) - len(failures),
        by_error=count_by(failures),
    )


def count_tokens(done: Sequence[Sample]) -> BenchTokens:
    """The server's own counts; chunks are never taken for tokens."""
    silent = sum(sample.output_tokens < 0 or sample.prompt_tokens < 0 for sample in done)
    if silent or not done:
        reason = f"{silent} of {len(done)} answers came without usage" if silent else "no answers"
        return BenchTokens(None, None, None, None, None, reason)
    inputs = [sample.prompt_tokens for sample in done]
    total = sum(sample.output_tokens for sample in done)
    return BenchTokens(sum(inputs) / len(done), min(inputs), max(inputs), total / len(done), total)


def _throughput(done: Sequence[Sample], window: tuple[int, int], kind: Any, *, counted: bool) -> BenchThroughput:
    """Rates inside the window. A request that lies across its end counts by its part inside: leaving it
    out would cost up to one request per stream, counting it whole would count the drain.
    """
    seconds = (window[1] - window[0]) / 1e9
    if seconds <= 0 or not done:
        return BenchThroughput(None, None, None, max(seconds, 0.0), kind)
    parts = [_inside(sample.sent_ns, sample.end_ns, window) for sample in done]
    written = sum(s.output_tokens * _inside(s.first_ns, s.last_ns, window) for s in done)
    read = sum(s.prompt_tokens * part for s, part in zip(done, parts, strict=True))
    return BenchThroughput(
        requests_per_s=sum(parts) / seconds,
        output_tokens_per_s=written / seconds if counted else None,
        input_tokens_per_s=read / seconds if counted else None,
        window_s=seconds,
        window=kind,
    )


def _inside(begin: int, end: int, window: tuple[int, int]) -> float:
    """The part of [begin, end] that lies in the window, 0 to 1."""
    if end <= begin:
        return float(window[0] <= begin <= window[1])
    return max(0, min(end, window[1]) - max(begin, window[0])) / (end - begin)


def latencies(done: Sequence[Sample], outcome: Outcome) -> dict[str, Percentiles]:
    """All latencies in ms, from the request's first byte sent.

    TTFB: first byte of the response. TTFT: first token of any kind, the role chunk is none. TTFO: first
    token of the answer, reasoning is none. TPOT: (last - first token) / (usage tokens - 1).
    """
    return {
        "ttfb": summarize([(s.ttfb_ns - s.sent_ns) / 1e6 for s in done]),
        "ttft": summarize([(s.first_ns - s.sent_ns) / 1e6 for s in done if s.first_ns]),
        "ttfo": summarize([(s.answer_ns - s.sent_ns) / 1e6 for s in done if s.answer_ns]),
        "tpot": summarize(
            [
                (s.last_ns - s.first_ns) / 1e6 / (s.output_tokens - 1)
                for s in done
                if s.output_tokens > 1 and s.last_ns > s.first_ns
            ]
        ),
        "inter_chunk": merged(report.gaps for report in outcome.reports).summarize_ms(),
        "e2e": summarize([(s.end_ns - s.sent_ns) / 1e6 for s in done]),
    }


def _client() -> dict[str, Any]:
    return {
        "mdeploy": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def document(result: BenchResult) -> dict[str, Any]:
    """The JSON contract, without its schema number."""
    return dataclasses.asdict(result)


def human(result: BenchResult) -> str:
    """What a person wants to see, within 80 columns."""
    lines = [*_title(result), "", *_counts(result), "", *_latency_lines(result), ""]
    return "\n".join([*lines, *_audit_lines(result)])


def _title(result: BenchResult) -> Iterator[str]:
    work = result.workload
    if work["endpoint"] == "http":
        asked = work["request"]
        yield f"{asked['method']} {result.target}{asked['path']}  {asked['content_type'].partition(';')[0]}"
        yield f"{_loop(result)}, {asked['body_bytes']:,} bytes a request"
        return
    about = "" if work["input_tokens_exact"] else "about "
    yield f"{work['endpoint']} {result.target}  model {work['model']}"
    yield f"{_loop(result)}, {about}{work['input_tokens']} tokens in, {work['output_tokens']} out"


def _loop(result: BenchResult) -> str:
    cut = " (interrupted)" if result.interrupted else ""
    return f"closed loop, {result.workload['concurrency']} at a time, {result.seconds:.1f} s{cut}"


def _counts(result: BenchResult) -> Iterator[str]:
    requests, rates, tokens = result.requests, result.throughput, result.tokens
    ended = [f"{requests.completed} completed", f"{requests.failed} failed"]
    ended += [f"{requests.cancelled} cut off"] if requests.cancelled else []
    yield f"requests    {', '.join(ended)}"
    yield from (f"            {number} x {error}" for error, number in requests.by_error.items())
    yield f"throughput  {_number(rates.requests_per_s)} requests/s"
    if result.workload["endpoint"] == "http":
        return
    yield f"            {_number(rates.output_tokens_per_s)} output tokens/s"
    yield f"            {_number(rates.input_tokens_per_s)} input tokens/s"
    if tokens.reason:
        yield f"tokens      unknown: {tokens.reason}"
    else:
        yield f"tokens      {_number(tokens.input_mean)} in, {_number(tokens.output_mean)} out a request"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _latency_lines(result: BenchResult) -> Iterator[str]:
    columns = ("mean", "p50", "p90", "p99", "p99.9")
    yield f"{'latency, ms':26}" + "".join(f"{name:>10}" for name in columns)
    hidden = _OF_TOKENS if result.workload["endpoint"] == "http" else ()
    for key, label in _LABELS.items():
        if key in hidden:
            continue
        row = result.latency_ms[key]
        figures = (row.mean, row.p50, row.p90, row.p99, row.p999)
        yield f"{label:26}" + "".join(f"{_milliseconds(figure):>10}" for figure in figures)
    yield "-: too few samples for that figure (p90 44, p99 460, p99.9 4600)"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _audit_lines(result: BenchResult) -> Iterator[str]:
    checked = result.audit
    lag, late = checked.client_lag_ms, checked.send_lateness_ms
    achieved = "-" if checked.achieved is None else f"{checked.achieved:.1%}"
    yield f"audit       {'valid' if checked.valid else 'INVALID'}"
    yield from _wrapped("because", checked.reasons)
    yield f"            client lag {_tail(lag)}, send lateness {_tail(late)}"
    yield f"            concurrency {achieved} of target, busiest worker {checked.worker_cpu:.0%} of a core"
    yield from _wrapped("note", checked.notes)


def _tail(figures: Percentiles) -> str:
    if figures.p99 is not None:
        return f"p99 {_milliseconds(figures.p99)} ms"
    return f"p50 {_milliseconds(figures.p50)} ms"


def _wrapped(label: str, sentences: Sequence[str]) -> Iterator[str]:
    import textwrap

    for sentence in sentences:
        yield from textwrap.wrap(f"{label}: {sentence}", 80, initial_indent=" " * 12, subsequent_indent=" " * 12)
