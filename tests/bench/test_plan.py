from __future__ import annotations

import json
import socket
from dataclasses import replace

import pytest

from mdeploy.bench import plan, prompts
from mdeploy.bench.prompts import LITTLE_WORDS, WORDS
from mdeploy.bench.types import BenchOptions, BenchTarget, LoadPlan
from mdeploy.errors import UsageError

TARGET = BenchTarget("http://gpu:8000/v1/", "m", "sk-secret")
ADDRESS = (int(socket.AF_INET), ("127.0.0.1", 8000))


def letters(size: int) -> prompts.Count:
    """A tokenizer that cuts words into pieces of `size` letters, in a template of 9 tokens."""
    return lambda text: 9 + sum(-(-len(word) // size) for word in text.split())


def build(options: BenchOptions, texts: prompts.Prompts | None = None) -> LoadPlan:
    texts = texts or prompts.build(options.input_tokens, options.seed, None)
    return plan.build(TARGET, "m", options, texts, ADDRESS, ignore_eos=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"concurrency": -1},
        {"duration_s": 0.0},
        {"duration_s": float("nan")},
        {"duration_s": float("inf")},
        {"requests": 0},
        {"duration_s": 1.0, "requests": 1},
        {"input_tokens": 0},
        {"output_tokens": -1},
        {"workers": 0},
        {"timeout_s": 0.0},
    ],
)
def test_an_impossible_load_is_a_usage_error(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        plan.validate(BenchOptions(**wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://gpu:8000", "http://gpu:8000/", "http://gpu:8000/v1", "http://gpu:8000/v1/"])
def test_root_url(url: str) -> None:
    assert plan.root_url(BenchTarget(url)) == "http://gpu:8000"


@pytest.mark.parametrize("url", ["https://gpu", "gpu:8000", "http://", "http://gpu:99999", "http://u:p@gpu", "ftp://x"])
def test_what_is_no_server(url: str) -> None:
    with pytest.raises(UsageError):
        plan.root_url(BenchTarget(url))


def test_requests_are_whole_http_with_the_right_length_and_key() -> None:
    work = build(BenchOptions(input_tokens=50, output_tokens=12))
    for number in (0, 1, 63, 64, 100_000):
        head, body = plan.request_bytes(work, number).split(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
        assert f"Content-Length: {len(body)}" in lines
        assert "Authorization: Bearer sk-secret" in lines
        request = json.loads(body)
        assert request["stream_options"] == {"include_usage": True}
        assert (request["max_tokens"], request["min_tokens"], request["ignore_eos"]) == (12, 12, True)
        assert len(request["messages"][0]["content"].split()) == 51


def test_the_key_shows_nowhere() -> None:
    work = build(BenchOptions())
    assert "sk-secret" not in f"{work}{work.workload}{TARGET}"


def test_completions_send_a_prompt() -> None:
    work = build(BenchOptions(endpoint="completions"))
    head, body = plan.request_bytes(work, 0).split(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions ")
    assert json.loads(body)["prompt"].startswith("Write ")


def test_no_two_prompts_share_a_beginning() -> None:
    work = build(BenchOptions(input_tokens=64))
    starts = {b" ".join(plan.request_bytes(work, i).split(b'"content":"')[1].split()[:5]) for i in range(5000)}
    assert len(starts) == 5000


def test_words_are_all_different() -> None:
    assert len(set(WORDS + LITTLE_WORDS)) == len(WORDS) + len(LITTLE_WORDS)


def test_workers_share_the_load_exactly() -> None:
    work = build(BenchOptions(concurrency=10, requests=101, workers=3))
    jobs = plan.jobs(work)
    assert sum(job.concurrency for job in jobs) == 10
    assert sum(job.requests or 0 for job in jobs) == 101
    numbers = [job.first + i * job.stride for job in jobs for i in range(job.requests or 0)]
    assert len(set(numbers)) == 101


def test_never_more_workers_than_work() -> None:
    assert plan.worker_count(BenchOptions(concurrency=2, workers=8)) == 2
    assert plan.worker_count(BenchOptions(concurrency=9, requests=1, workers=8)) == 1
    assert build(BenchOptions(concurrency=9, requests=4)).concurrency == 4


def test_the_hash_names_the_shape_of_the_load_only() -> None:
    options = BenchOptions()

    def hashed(changed: BenchOptions, model: str = "m") -> str:
        texts = prompts.build(changed.input_tokens, changed.seed, None)
        return str(plan.build(TARGET, model, changed, texts, ADDRESS, ignore_eos=True).workload["hash"])

    same = [replace(options, requests=9), replace(options, duration_s=5.0), replace(options, workers=2)]
    assert {hashed(o) for o in same} | {hashed(options, "other")} == {hashed(options)}
    others = [
        replace(options, concurrency=9),
        replace(options, input_tokens=9),
        replace(options, output_tokens=9),
        replace(options, endpoint="completions"),
        replace(options, seed=1),
    ]
    assert len({hashed(o) for o in [options, *others]}) == 6


@pytest.mark.parametrize("size", [100, 5, 3, 2])
@pytest.mark.parametrize("wanted", [13, 14, 64, 1000])
def test_prompts_hit_the_wanted_length(wanted: int, size: int) -> None:
    """Also where many words are several tokens: those are left out."""
    texts = prompts.build(wanted, 0, letters(size))
    assert texts.exact
    assert {letters(size)(texts.text(number)) for number in range(200)} == {wanted}


def test_a_tiny_vocabulary_is_met_as_well_as_it_can_be() -> None:

    def bytewise(text: str) -> int:
        return 9 + len(text)

    texts = prompts.build(300, 0, bytewise)
    assert not texts.exact
    assert 270 <= bytewise(texts.text(0)) <= 300


def test_a_prompt_shorter_than_its_template_cannot_be() -> None:
    with pytest.raises(UsageError, match="template"):
        prompts.build(9, 0, letters(100))


def test_single_tokens_costs_few_calls_where_all_are() -> None:
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return letters(100)(text)

    assert prompts.single_tokens(WORDS, 10, count) == WORDS
    assert len(calls) == 1


def test_the_seed_decides_the_prompts() -> None:
    assert prompts.build(50, 1, None) == prompts.build(50, 1, None)
    assert prompts.build(50, 1, None).text(0) != prompts.build(50, 2, None).text(0)
