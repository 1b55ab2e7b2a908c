"""From options to a `LoadPlan`: pure, all bytes of the load made here and none of them sent.

The server's answers to questions (its model, whether it counts tokens, what it accepts) come in as
values; `control` asked for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from mdeploy.bench import targets
from mdeploy.bench.prompts import Prompts, spell
from mdeploy.bench.request import BenchRequest
from mdeploy.bench.types import BenchOptions, BenchTarget, LoadPlan
from mdeploy.bench.wire import Job
from mdeploy.errors import UsageError

DEFAULT_DURATION_S = 30.0
_STREAMS_PER_WORKER = 256
_MARK = "\x00"
# Not part of what is compared: where and how long, and what the server calls its model.
_NOT_HASHED = ("model", "duration_s", "requests")


def validate(options: BenchOptions) -> None:
    """Raise UsageError for a load that cannot be."""
    _positive("--concurrency", options.concurrency)
    _positive("--input-tokens", options.input_tokens)
    _positive("--output-tokens", options.output_tokens)
    _positive("--timeout", options.timeout_s)
    if options.duration_s is not None and options.requests is not None:
        raise UsageError("--duration and --requests exclude each other", hint="give one of them")
    if options.duration_s is not None:
        _positive("--duration", options.duration_s)
    if options.requests is not None:
        _positive("--requests", options.requests)
    if options.workers is not None:
        _positive("--workers", options.workers)


def _positive(flag: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UsageError(f"{flag} must be greater than 0, not {value:g}")


def root_url(target: BenchTarget) -> str:
    """The server's root: no trailing slash, no /v1. Raises UsageError for what is no http URL."""
    root = target.base_url.rstrip("/").removesuffix("/v1").rstrip("/")
    parts = urlsplit(root)
    if parts.scheme == "https":
        raise UsageError("bench cannot measure through TLS yet", hint="point it at the http port behind the proxy")
    if parts.scheme != "http" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise UsageError(f"not the URL of a server: {target.base_url}", hint="mdeploy bench http://HOST:PORT")
    try:
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"not the URL of a server: {target.base_url} ({error})") from error
    return root


def request_options(options: BenchOptions, *, ignore_eos: bool) -> dict[str, Any]:
    """Fields that fix the answer's length: vLLM's `ignore_eos` and `min_tokens`, where accepted."""
    fixed = {"ignore_eos": True, "min_tokens": options.output_tokens} if ignore_eos else {}
    return {"max_tokens": options.output_tokens, **fixed}


def effective(options: BenchOptions) -> BenchOptions:
    """No more at a time than there are requests, and a duration where nothing was said."""
    if options.requests is not None:
        return replace(options, concurrency=min(options.concurrency, options.requests))
    return replace(options, duration_s=options.duration_s or DEFAULT_DURATION_S)


def build(
    target: BenchTarget,
    model: str,
    options: BenchOptions,
    prompts: Prompts,
    address: tuple[int, tuple[Any, ...]],
    *,
    ignore_eos: bool,
) -> LoadPlan:
    """The load against `address` (family, socket address of the resolved host)."""
    options = effective(options)
    endpoint = targets.for_endpoint(options.endpoint)
    document = targets.body(endpoint, model, _MARK, request_options(options, ignore_eos=ignore_eos))
    start, end = json_bytes(document).split(json_bytes(_MARK).strip(b'"'))
    return LoadPlan(
        base_url=root_url(target),
        address=address,
        head=_head(root_url(target), BenchRequest(endpoint.path), target.api_key, "text/event-stream"),
        body_start=start + prompts.opening.encode(),
        nonce=prompts.nonce,
        nonce_length=prompts.nonce_length,
        tails=tuple(tail.encode() for tail in prompts.tails),
        body_end=end,
        endpoint=options.endpoint,
        concurrency=options.concurrency,
        duration_s=options.duration_s,
        requests=options.requests,
        timeout_s=options.timeout_s,
        workers=worker_count(options),
        workload=_workload(model, options, prompts, ignore_eos=ignore_eos),
    )


def build_plain(
    target: BenchTarget, request: BenchRequest, options: BenchOptions, address: tuple[int, tuple[Any, ...]]
) -> LoadPlan:
    """The same request over and over, as a load against `address`."""
    options = effective(options)
    return LoadPlan(
        base_url=root_url(target),
        address=address,
        head=_head(root_url(target), request, target.api_key, "*/*"),
        body_start=request.body,
        nonce=(),
        nonce_length=0,
        tails=(b"",),
        body_end=b"",
        endpoint="http",
        concurrency=options.concurrency,
        duration_s=options.duration_s,
        requests=options.requests,
        timeout_s=options.timeout_s,
        workers=worker_count(options),
        workload=_plain_workload(target, request, options),
    )


def json_bytes(value: Any) -> bytes:
    """A value as JSON, compact."""
    import orjson

    return orjson.dumps(value)


def _head(root: str, request: BenchRequest, api_key: str | None, accept: str) -> bytes:
    parts = urlsplit(root)
    lines = [
        f"{request.method} {parts.path}{request.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Content-Type: {request.content_type}",
        f"Accept: {accept}",
        *([f"Authorization: Bearer {api_key}"] if api_key else []),
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode()


def request_bytes(plan: LoadPlan, number: int) -> bytes:
    """Request `number` as it goes over the wire."""
    nonce = spell(number, plan.nonce, plan.nonce_length).encode()
    tail = plan.tails[number % len(plan.tails)]
    length = len(plan.body_start) + len(nonce) + len(tail) + len(plan.body_end)
    return b"".join((plan.head, str(length).encode(), b"\r\n\r\n", plan.body_start, nonce, tail, plan.body_end))


def worker_count(options: BenchOptions) -> int:
    """One process for every 256 streams, but no more than half the cores; never more than streams."""
    cores = len(os.sched_getaffinity(0))
    wanted = options.workers or min(-(-options.concurrency // _STREAMS_PER_WORKER), max(1, cores // 2))
    return min(wanted, options.concurrency, options.requests or wanted)


def jobs(plan: LoadPlan) -> tuple[Job, ...]:
    """The load cut into equal parts, one a worker."""
    return tuple(
        Job(
            plan=plan,
            concurrency=_share(plan.concurrency, index, plan.workers),
            requests=None if plan.requests is None else _share(plan.requests, index, plan.workers),
            first=index,
            stride=plan.workers,
        )
        for index in range(plan.workers)
    )


def _share(total: int, index: int, parts: int) -> int:
    return total // parts + (index < total % parts)


def _workload(model: str, options: BenchOptions, prompts: Prompts, *, ignore_eos: bool) -> Mapping[str, Any]:
    workload = {
        "endpoint": options.endpoint,
        "model": model,
        "loop": "closed",
        "concurrency": options.concurrency,
        "duration_s": options.duration_s,
        "requests": options.requests,
        "input_tokens": options.input_tokens,
        "input_tokens_exact": prompts.exact,
        "output_tokens": options.output_tokens,
        "ignore_eos": ignore_eos,
        "stream": True,
        "seed": options.seed,
    }
    return {"hash": workload_hash(workload), **workload}


def _plain_workload(target: BenchTarget, request: BenchRequest, options: BenchOptions) -> Mapping[str, Any]:
    """The keys of any workload; what is about tokens is null."""
    workload = {
        "endpoint": "http",
        "model": target.model,
        "loop": "closed",
        "concurrency": options.concurrency,
        "duration_s": options.duration_s,
        "requests": options.requests,
        "input_tokens": None,
        "input_tokens_exact": False,
        "output_tokens": None,
        "ignore_eos": False,
        "stream": False,
        "seed": None,
        "request": {
            "method": request.method,
            "path": request.path,
            "content_type": request.content_type,
            "body_bytes": len(request.body),
            "digest": request.digest,
        },
    }
    return {"hash": workload_hash(workload), **workload}


def workload_hash(workload: Mapping[str, Any]) -> str:
    """Two results are comparable when this agrees: everything that shapes the load, and nothing else."""
    import orjson

    shaping = {key: value for key, value in workload.items() if key not in _NOT_HASHED}
    return hashlib.sha256(orjson.dumps(shaping, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
