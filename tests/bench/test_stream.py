from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from mdeploy.bench import targets
from mdeploy.bench.stream import Counters, Stream
from mdeploy.bench.types import BenchEndpoint

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
MS = 1_000_000


def chat(finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return data({"id": "x", "choices": [choice], "usage": None})


def data(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


USAGE = data({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
DONE = b"data: [DONE]\n\n"


def part(*events: bytes) -> bytes:
    """One HTTP chunk."""
    body = b"".join(events)
    return b"%x\r\n%b\r\n" % (len(body), body)


def read(pieces: Sequence[bytes], endpoint: BenchEndpoint = "chat", check: bool = True) -> tuple[Stream, Counters]:
    """Feed one piece a millisecond, the first at 1 ms."""
    counters = Counters()
    stream = Stream(targets.for_endpoint(endpoint), counters, check)
    for index, piece in enumerate(pieces, start=1):
        stream.feed(piece, index * MS)
    return stream, counters


def test_role_finish_and_usage_chunks_are_no_tokens() -> None:
    stream, counters = read(
        [
            HEAD + part(chat(role="assistant", content="")),
            part(chat(content="a")),
            part(chat(content="b")),
            part(chat(finish="length"), USAGE, DONE) + END,
        ]
    )
    assert stream.verdict() is None
    assert (stream.ttfb_ns, stream.first_ns, stream.last_ns) == (MS, 2 * MS, 3 * MS)
    assert (stream.chunks, stream.prompt_tokens, stream.output_tokens) == (2, 7, 3)
    assert (counters.gaps.count, counters.gaps.total) == (1, MS)
    assert (counters.checked, counters.mismatches) == (2, 0)
    assert stream.complete
    assert stream.reusable


def test_reasoning_is_a_first_token_but_not_an_answer() -> None:
    for key in ("reasoning_content", "reasoning"):
        stream, _ = read([HEAD, part(chat(**{key: "hm"})), part(chat(content="a")), part(DONE) + END])
        assert (stream.first_ns, stream.answer_ns) == (2 * MS, 3 * MS)


def test_a_tool_call_is_a_token() -> None:
    call = {"index": 0, "function": {"name": "weather", "arguments": ""}}
    empty = {"index": 0, "function": {"arguments": ""}}
    stream, _ = read([HEAD, part(chat(tool_calls=[empty])), part(chat(tool_calls=[call])), part(DONE) + END])
    assert (stream.first_ns, stream.answer_ns, stream.chunks) == (3 * MS, 3 * MS, 1)


def test_text_that_looks_like_json_is_only_text() -> None:
    """An escaped quote cannot pass for a key, whatever the model writes."""
    tricky = '","content":"x'
    stream, counters = read(
        [HEAD, part(chat(role="assistant", content="", refusal=tricky)), part(chat(content=tricky)), part(DONE) + END]
    )
    assert (stream.first_ns, stream.chunks, counters.mismatches) == (3 * MS, 1, 0)


def test_spaces_in_the_json_cost_time_but_not_truth() -> None:
    event = b"data: " + json.dumps({"choices": [{"delta": {"content": "a"}}]}, indent=1).replace("\n", " ").encode()
    stream, _ = read([HEAD, part(event + b"\n\n"), part(DONE) + END])
    assert (stream.chunks, stream.verdict()) == (1, None)


def test_completions_text() -> None:
    stream, _ = read(
        [HEAD, part(data({"choices": [{"text": "a"}]})), part(data({"choices": [{"text": ""}]}), DONE) + END],
        "completions",
    )
    assert (stream.chunks, stream.first_ns, stream.verdict()) == (1, 2 * MS, None)


def test_chunks_that_came_together_give_no_gaps() -> None:
    stream, counters = read(
        [
            HEAD + part(chat(content="a"), chat(content="b")),
            part(chat(content="c"), chat(content="d"), chat(content="e")),
            part(chat(content="f")),
            part(DONE) + END,
        ]
    )
    assert stream.first_coalesced
    assert stream.chunks == 6
    assert (counters.coalesced_reads, counters.gaps_omitted) == (2, 4)
    assert (counters.gaps.count, counters.gaps.total) == (1, MS)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_bytes_may_be_cut_anywhere(newline: bytes, size: int) -> None:
    events = (chat(role="assistant", content=""), chat(content="a"), chat(content="b"), USAGE, DONE)
    whole = HEAD + part(*(event.replace(b"\n", newline) for event in events)) + END
    stream, _ = read([whole[i : i + size] for i in range(0, len(whole), size)])
    assert (stream.verdict(), stream.chunks, stream.output_tokens, stream.complete) == (None, 2, 3, True)


def test_comments_and_event_names_are_skipped() -> None:
    stream, _ = read([HEAD, part(b": ping\n\n", b"event: message\n" + chat(content="a")), part(DONE) + END])
    assert (stream.chunks, stream.verdict()) == (1, None)


@pytest.mark.parametrize(
    ("pieces", "verdict"),
    [
        ([HEAD, part(chat(content="a"), DONE) + END], None),
        ([HEAD, part(chat(content="a"), b"data: [DONE]") + END], None),
        ([HEAD, part(chat(content="a", finish="length")) + END], None),
        ([HEAD, part(chat(content="a")) + END], "truncated"),
        ([HEAD, part(chat(role="assistant", content=""), DONE) + END], "no_tokens"),
        ([HEAD, part(chat(content="a"), data({"error": {"message": "oom"}}), DONE) + END], "error_in_stream"),
        ([HEAD, part(chat(content="a"), data({"object": "error", "message": "x"})) + END], "error_in_stream"),
        ([HEAD, part(chat(content="a"), b'data: {"choices": [\n\n', DONE) + END], "bad_chunk"),
        ([HEAD, part(b"data: 7\n\n", DONE) + END], "bad_chunk"),
        ([b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}"], "http_503"),
        ([b"SSH-2.0-OpenSSH\r\n"], "bad_response"),
    ],
)
def test_how_it_ended(pieces: list[bytes], verdict: str | None) -> None:
    stream, _ = read(pieces)
    assert stream.complete
    assert stream.verdict() == verdict


@pytest.mark.parametrize(
    ("pieces", "ending"),
    [
        ([], "reset"),
        ([HEAD, part(chat(content="a"))], "truncated"),
        ([HEAD, part(chat(content="a"), DONE)], None),
        ([b"HTTP/1.1 500 Oops\r\n\r\n", b"half an answ"], "http_500"),
    ],
)
def test_a_closed_connection(pieces: list[bytes], ending: str | None) -> None:
    stream, _ = read(pieces)
    assert not stream.complete
    assert stream.eof() == ending
