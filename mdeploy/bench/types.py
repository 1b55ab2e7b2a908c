"""The frozen values of a measurement: what is asked, what one request did, what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mdeploy.bench.request import Ask

BenchEndpoint = Literal["chat", "completions", "http"]
"""`http` is one plain request without tokens: apps, and any other server."""


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A server to measure. `base_url` may end in /v1 or not; without a model the server is asked for one.

    `kind` is that of the service, empty for a URL.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    name: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """A closed loop: `concurrency` requests at any time, for `duration_s` seconds or `requests` requests.

    With neither of the two, 30 seconds. Lengths are in tokens, `timeout_s` is per request,
    `workers` are load processes (None: as many as the concurrency needs). `ask` is the request of endpoint `http`.
    """

    concurrency: int = 8
    duration_s: float | None = None
    requests: int | None = None
    input_tokens: int = 256
    output_tokens: int = 128
    endpoint: BenchEndpoint = "chat"
    workers: int | None = None
    timeout_s: float = 120.0
    seed: int = 0
    ask: Ask = field(default_factory=Ask)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything a load worker needs; all bytes are serialised before the load starts.

    Request i is `head`, the body's length, `body_start`, four words of `nonce` that spell i (so that no
    two prompts share a prefix), `tails[i % len(tails)]` and `body_end`. A plain request has only `body_start`.
    """

    base_url: str
    address: tuple[int, tuple[Any, ...]]
    head: bytes = field(repr=False)
    body_start: bytes
    nonce: tuple[str, ...]
    nonce_length: int
    tails: tuple[bytes, ...] = field(repr=False)
    body_end: bytes
    endpoint: BenchEndpoint
    concurrency: int
    duration_s: float | None
    requests: int | None
    timeout_s: float
    workers: int
    workload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are Unix nanoseconds, 0 for what never happened; `error` None is a success.

    `due_ns` is when its place in the loop became free, `connect_ns` a duration. Token counts are the
    server's own, -1 where it gave none. `chunks` counts token-bearing chunks, which are not tokens.
    """

    due_ns: int
    connect_ns: int
    sent_ns: int
    ttfb_ns: int
    first_ns: int
    answer_ns: int
    last_ns: int
    end_ns: int
    prompt_tokens: int
    output_tokens: int
    chunks: int
    first_coalesced: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """How far a running measurement is."""

    elapsed_s: float
    running: int
    completed: int
    failed: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Summary of `count` values; None is a figure so few values cannot bear."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None


@dataclass(frozen=True, slots=True)
class BenchRequests:
    """How the requests ended; `cancelled` ones were cut off by an interrupt and belong to nobody's fault."""

    completed: int
    failed: int
    cancelled: int
    by_error: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class BenchTokens:
    """What the server says it read and wrote per request; `reason` explains missing counts."""

    input_mean: float | None
    input_min: int | None
    input_max: int | None
    output_mean: float | None
    output_total: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BenchThroughput:
    """Rates over the steady window (`window_s`), the drain left out."""

    requests_per_s: float | None
    output_tokens_per_s: float | None
    input_tokens_per_s: float | None
    window_s: float
    window: Literal["steady", "whole"]


@dataclass(frozen=True, slots=True)
class BenchAudit:
    """Whether the client can be believed. `reasons` make a run invalid, `notes` only qualify it.

    `achieved` is the mean concurrency over the target's, `worker_cpu` the share of a core the busiest
    load process used, `coalesced_reads` the reads that held several token chunks.
    """

    valid: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    client_lag_ms: Percentiles
    send_lateness_ms: Percentiles
    achieved: float | None
    worker_cpu: float
    timestamps: Literal["kernel", "user"]
    coalesced_reads: int
    clock_step_ms: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One measurement, as `bench --json` prints it. `started` is Unix time, `seconds` the whole run."""

    target: str
    started: float
    seconds: float
    interrupted: bool
    workload: Mapping[str, Any]
    requests: BenchRequests
    tokens: BenchTokens
    throughput: BenchThroughput
    latency_ms: Mapping[str, Percentiles]
    audit: BenchAudit
    environment: Mapping[str, Any]
