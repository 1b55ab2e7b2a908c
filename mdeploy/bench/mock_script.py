"""What the mock server says and when: pure, one script a request, bytes made before the clock runs.

The chunks have vLLM's form: a role chunk that is no token, token chunks, a finish chunk, a usage
chunk without choices, `[DONE]`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from mdeploy.bench.types import BenchEndpoint

Fault = Literal["none", "503", "error", "truncate", "no-done", "reset", "hang", "garbage", "empty"]
FAULTS: tuple[Fault, ...] = ("none", "503", "error", "truncate", "no-done", "reset", "hang", "garbage", "empty")

_TEMPLATE_TOKENS = 9
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class MockOptions:
    """How the mock behaves. Times in ms; lengths in tokens, `coalesce` in chunks a write."""

    ttft_ms: float = 50.0
    itl_ms: float = 20.0
    tokens: int | None = None
    tokens_per_chunk: int = 1
    reasoning: int = 0
    coalesce: int = 1
    early_role: bool = False
    usage: bool = True
    crlf: bool = False
    model: str = "mock"
    api_key: str | None = None
    reject_ignore_eos: bool = False
    tokenize: bool = True
    word_letters: int = 100
    fault: Fault = "none"
    fault_rate: float = 1.0
    fault_after: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes due `after_ns` from the request's arrival; `tokens` of its chunks carry tokens."""

    after_ns: int
    data: bytes
    tokens: int = 0
    last: Literal["", "keep", "close", "reset"] = ""


@dataclass(frozen=True, slots=True)
class Script:
    """All writes of one answer, in order."""

    writes: tuple[Write, ...]
    prompt_tokens: int
    output_tokens: int


def prompt_text(request: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a request, and whether a chat template goes around it."""
    messages = request.get("messages")
    if messages is None:
        return str(request.get("prompt", "")), False
    return " ".join(str(message.get("content", "")) for message in messages), True


def count_tokens(request: Mapping[str, Any], options: MockOptions) -> int:
    """The mock's tokenizer: a token for every `word_letters` letters begun in a word."""
    text, chat = prompt_text(request)
    words = sum(-(-len(word) // options.word_letters) for word in text.split())
    return words + (_TEMPLATE_TOKENS if chat else 0)


def faulty(number: int, options: MockOptions) -> bool:
    """Whether request `number` (from 1) fails: exactly `fault_rate` of those past `fault_after`."""
    number -= options.fault_after
    if options.fault == "none" or number <= 0:
        return False
    return int(number * options.fault_rate) > int((number - 1) * options.fault_rate)


def answer(endpoint: BenchEndpoint, request: Mapping[str, Any], options: MockOptions, fault: Fault) -> Script:
    """The script of one request to a completions endpoint."""
    tokens = max(1, options.tokens or int(request.get("max_tokens") or 16))
    return _script(endpoint, options, fault, count_tokens(request, options), tokens, bool(request.get("stream")))


@functools.lru_cache(maxsize=256)
def _script(
    endpoint: BenchEndpoint, options: MockOptions, fault: Fault, prompt: int, tokens: int, streamed: bool
) -> Script:
    usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    stream = _Stream(endpoint, options, usage if options.usage else None, fault)
    writes = stream.writes(tokens) if streamed else stream.whole(tokens)
    return Script(tuple(writes), prompt, tokens)


def plain(document: Mapping[str, Any] | bytes, status: str = "200 OK") -> bytes:
    """A whole JSON response."""
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def failure(status: str, message: str) -> bytes:
    """An error in OpenAI's form."""
    code = int(status.split()[0])
    return plain({"error": {"message": message, "type": "mock", "param": None, "code": code}}, status)


class _Stream:
    def __init__(
        self, endpoint: BenchEndpoint, options: MockOptions, usage: Mapping[str, int] | None, fault: Fault
    ) -> None:
        self._chat = endpoint == "chat"
        self._options = options
        self._usage = usage
        self._fault = fault

    def writes(self, tokens: int) -> Iterator[Write]:
        options, fault = self._options, self._fault
        chunks = 0 if fault == "empty" else -(-tokens // options.tokens_per_chunk)
        first_ns = int(options.ttft_ms * 1e6)
        if fault in ("hang", "503"):
            yield from self._never(first_ns)
            return
        if fault == "reset":
            yield Write(first_ns, b"", last="reset")
            return
        role = self._event({"role": "assistant", "content": ""}) if self._chat else b""
        yield Write(0 if options.early_role else first_ns, _STREAM_HEAD + _http_chunk(role))
        for begin in range(0, chunks, options.coalesce):
            if begin >= chunks // 2 and fault in ("error", "truncate", "garbage", "no-done"):
                yield self._broken_end(begin)
                return
            yield self._tokens(begin, min(begin + options.coalesce, chunks))
        yield self._end(chunks)

    def whole(self, tokens: int) -> Iterator[Write]:
        text = " w" * tokens
        message = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **message, "finish_reason": "length"}
        document = {"object": "answer", "choices": [choice], "usage": self._usage}
        yield Write(self._due_ns(tokens - 1), plain(document), tokens=1, last="keep")

    def _never(self, first_ns: int) -> Iterator[Write]:
        if self._fault == "503":
            yield Write(first_ns, failure("503 Service Unavailable", "the mock is overloaded"), last="keep")

    def _due_ns(self, chunk: int) -> int:
        return int((self._options.ttft_ms + chunk * self._options.itl_ms) * 1e6)

    def _tokens(self, begin: int, end: int) -> Write:
        """Chunks written together go when the last of them is due."""
        events = b"".join(self._token(number) for number in range(begin, end))
        return Write(self._due_ns(end - 1), _http_chunk(events), tokens=end - begin)

    def _token(self, number: int) -> bytes:
        text = " w" * self._options.tokens_per_chunk
        if not self._chat:
            return self._event({"text": text})
        kind = "reasoning_content" if number < self._options.reasoning else "content"
        return self._event({kind: text})

    def _broken_end(self, chunk: int) -> Write:
        due = self._due_ns(chunk)
        if self._fault == "truncate":
            return Write(due, b"", last="close")
        if self._fault == "no-done":
            return Write(due, _END, last="keep")
        event = b'data: {"error": {"message": "the mock gave up", "code": 500}}'
        if self._fault == "garbage":
            event = b'data: {"choices": [{"del'
        done = self._close(event) + self._close(b"data: [DONE]")
        return Write(due, _http_chunk(done) + _END, last="keep")

    def _end(self, chunks: int) -> Write:
        events = self._event({} if self._chat else {"text": ""}, finish="length")
        if self._usage is not None:
            events += self._close(b"data: " + self._envelope([], usage=self._usage))
        events += self._close(b"data: [DONE]")
        return Write(self._due_ns(max(chunks - 1, 0)), _http_chunk(events) + _END, last="keep")

    def _event(self, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        body = {"delta": delta} if self._chat else delta
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish}
        return self._close(b"data: " + self._envelope([choice]))

    def _close(self, event: bytes) -> bytes:
        return event + (b"\r\n\r\n" if self._options.crlf else b"\n\n")

    def _envelope(self, choices: list[Any], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = {"id": "mock-8f1c0d1e2f3a4b5c", "object": kind, "created": 1760000000}
        return orjson.dumps({**head, "model": self._options.model, "choices": choices, **more})


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
