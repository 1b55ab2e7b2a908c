"""The whole measurement against a running mock. Counts and order are asserted, never a duration."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mdeploy import bench
from mdeploy.bench.types import BenchOptions, BenchProgress, BenchResult, BenchTarget
from mdeploy.errors import (
    ConfigError,
    MdeployError,
    NotFoundError,
    NotReadyError,
    UnavailableError,
    UsageError,
)
from tests.bench.mocks import mock, truth

pytestmark = pytest.mark.alone


def run(url: str, *, model: str | None = None, api_key: str | None = None, **options: Any) -> BenchResult:
    asked = {"concurrency": 4, "requests": 40, "input_tokens": 32, "output_tokens": 6, **options}
    return bench.run(BenchTarget(url, model, api_key), BenchOptions(**asked))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_the_counts_are_the_servers(endpoint: str) -> None:
    with mock() as url:
        result = run(url, endpoint=endpoint)
        rows = truth(url)
    assert (result.requests.completed, result.requests.failed) == (40, 0)
    assert len(rows) == 40
    assert {row["prompt_tokens"] for row in rows} == {32}
    assert len({row["prompt"] for row in rows}) == 40
    assert (result.tokens.input_min, result.tokens.input_max, result.tokens.output_total) == (32, 32, 240)
    assert result.workload["input_tokens_exact"]
    assert result.workload["ignore_eos"]
    assert result.workload["model"] == "mock"
    gaps = result.latency_ms["inter_chunk"].count
    assert gaps <= 40 * 5
    assert result.latency_ms["ttft"].p99 is None


def test_no_time_is_shorter_than_the_truth() -> None:
    """What the client saw encloses what the server logged, request by request."""
    with mock("--ttft-ms", "20") as url:
        result = run(url, concurrency=1, requests=10)
        rows = truth(url)
    true = sorted((row["sent_ns"][0] - row["received_ns"]) / 1e6 for row in rows)
    assert result.latency_ms["ttft"].mean is not None
    assert result.latency_ms["ttft"].mean >= sum(true) / 10 - 0.01
    assert min(true) >= 20


def test_the_order_of_first_things() -> None:
    """First byte (role chunk) before first token (reasoning) before first answer token before the end."""
    with mock("--early-role", "--reasoning", "2", "--itl-ms", "10", "--ttft-ms", "30") as url:
        latency = run(url, requests=8).latency_ms
    means = [latency[key].mean for key in ("ttfb", "ttft", "ttfo", "e2e")]
    assert all(mean is not None for mean in means)
    assert means == sorted(means, key=lambda mean: mean or 0)
    assert len(set(means)) == 4
    assert latency["ttfo"].count == 8


def test_a_chunk_is_not_a_token() -> None:
    with mock("--tokens-per-chunk", "3", "--itl-ms", "10") as url:
        result = run(url, requests=8, output_tokens=12)
    assert result.tokens.output_total == 8 * 12
    assert result.latency_ms["inter_chunk"].count <= 8 * 3
    tpot, gap = result.latency_ms["tpot"].mean, result.latency_ms["inter_chunk"].mean
    assert tpot is not None
    assert gap is not None
    assert tpot < gap


def test_chunks_written_together_are_counted_and_make_no_gaps() -> None:
    with mock("--coalesce", "2", "--itl-ms", "20") as url:
        result = run(url, requests=8, output_tokens=8)
    assert 1 <= result.audit.coalesced_reads <= 8 * 4
    assert result.latency_ms["inter_chunk"].count == 0
    assert result.latency_ms["inter_chunk"].p50 is None
    assert any("upper bound" in note for note in result.audit.notes)
    assert result.tokens.output_total == 64


def test_without_usage_there_are_no_token_figures() -> None:
    with mock("--no-usage") as url:
        result = run(url, requests=8)
    assert result.requests.completed == 8
    assert result.throughput.output_tokens_per_s is None
    assert result.throughput.requests_per_s is not None
    assert result.tokens.reason == "8 of 8 answers came without usage"
    assert result.latency_ms["tpot"].mean is None


def test_crlf_between_events() -> None:
    with mock("--crlf") as url:
        assert run(url, requests=8).tokens.output_total == 48


def test_an_approximate_length_says_so() -> None:
    with mock("--no-tokenize") as url:
        result = run(url, requests=4)
    assert not result.workload["input_tokens_exact"]
    assert result.tokens.input_mean == 32 + 1 + 9  # words, "Write", the mock's template


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("503", "http_503"),
        ("error", "error_in_stream"),
        ("truncate", "truncated"),
        ("no-done", "truncated"),
        ("reset", "reset"),
        ("garbage", "bad_chunk"),
        ("empty", "no_tokens"),
    ],
)
def test_every_fault_has_its_name_and_exact_count(fault: str, error: str) -> None:
    with mock("--fault", fault, "--fault-rate", "0.25", "--fault-after", "1") as url:
        result = run(url)
    assert result.requests.by_error == {error: 10}
    assert (result.requests.completed, result.requests.failed) == (30, 10)
    assert not result.audit.valid
    assert "10 of 40 requests failed" in " ".join(result.audit.reasons)


def test_an_answer_that_never_comes_times_out() -> None:
    with mock("--fault", "hang", "--fault-rate", "0.5", "--fault-after", "1") as url:
        result = run(url, requests=4, timeout_s=0.3)
    assert result.requests.by_error == {"timeout": 2}


def test_only_the_trial_works() -> None:
    with mock("--fault", "503", "--fault-after", "1") as url:
        result = run(url, requests=8)
    assert result.requests.by_error == {"http_503": 8}
    assert "no request completed" in result.audit.reasons
    assert result.latency_ms["ttft"].mean is None


def test_a_server_that_refuses_ignore_eos_is_asked_without() -> None:
    with mock("--reject-ignore-eos") as url:
        result = run(url, requests=4)
    assert result.workload["ignore_eos"] is False
    assert result.requests.completed == 4


def test_a_key_is_sent_and_its_absence_explained() -> None:
    with mock("--api-key", "sk-secret") as url:
        result = run(url, api_key="sk-secret", requests=4)
        assert result.requests.completed == 4
        assert "sk-secret" not in repr(result)
        for key in (None, "wrong"):
            for model in (None, "mock"):
                with pytest.raises(ConfigError) as caught:
                    run(url, api_key=key, model=model)
                assert "MDEPLOY_API_KEY" in caught.value.hint
                assert "wrong" not in f"{caught.value} {caught.value.hint}"


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with mock("--model", "real") as url, pytest.raises(NotFoundError) as caught:
        run(url, model="unreal")
    assert caught.value.hint == "it serves: real"


@pytest.mark.parametrize(
    ("fault", "kind"), [("503", UnavailableError), ("error", UnavailableError), ("reset", UnavailableError)]
)
def test_a_trial_that_fails_is_the_error(fault: str, kind: type[MdeployError]) -> None:
    with mock("--fault", fault) as url, pytest.raises(kind):
        run(url)


def test_a_trial_that_never_ends() -> None:
    with mock("--fault", "hang") as url, pytest.raises(NotReadyError, match="no answer in"):
        run(url, timeout_s=0.2)


def test_nobody_there() -> None:
    with pytest.raises(UnavailableError, match="cannot reach"):
        run("http://127.0.0.1:1")


def test_a_prompt_too_short_for_the_template() -> None:
    with mock() as url, pytest.raises(UsageError, match="template"):
        run(url, input_tokens=3)


@contextmanager
def talks_nonsense() -> Iterator[str]:
    """Listens, accepts, says something that is no HTTP."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_server_that_is_none() -> None:
    with talks_nonsense() as url, pytest.raises(UnavailableError):
        run(url)


def test_several_workers_share_exactly_the_requests() -> None:
    with mock() as url:
        result = run(url, concurrency=7, requests=41, workers=3)
        rows = truth(url)
    assert result.requests.completed == len(rows) == 41
    assert len({row["prompt"] for row in rows}) == 41


def test_a_duration_ends_what_starts_not_what_runs() -> None:
    """Nothing is cut off: everything the server began it also finished for us."""
    with mock("--ttft-ms", "40") as url:
        result = run(url, requests=None, duration_s=0.5)
        rows = truth(url)
    assert result.requests.completed == len(rows) >= 4
    assert result.requests.cancelled == 0
    assert result.throughput.window_s == pytest.approx(0.5)
    assert result.throughput.window == "steady"


def test_more_streams_than_requests() -> None:
    with mock() as url:
        assert run(url, concurrency=50, requests=3).requests.completed == 3


def test_long_prompts_are_sent_whole() -> None:
    """Larger than a socket's buffer, so that a request takes several writes."""
    with mock() as url:
        result = run(url, requests=6, input_tokens=400_000, output_tokens=2)
    assert (result.tokens.input_min, result.tokens.input_max) == (400_000, 400_000)
    assert result.requests.completed == 6


def test_progress_is_told() -> None:
    seen: list[BenchProgress] = []
    with mock("--ttft-ms", "100") as url:
        options = BenchOptions(concurrency=2, requests=20, input_tokens=16, output_tokens=2)
        bench.run(BenchTarget(url), options, seen.append)
    assert seen
    assert max(now.completed for now in seen) <= 20
