"""One streamed answer, from the first byte to `[DONE]`: what arrived when, and how it ended.

It knows HTTP and server-sent events, no sockets and no clock: bytes come in with their arrival time.
"""

from __future__ import annotations

from typing import Any

import httptools
import orjson

from mdeploy.bench import targets
from mdeploy.bench.stats import Histogram
from mdeploy.bench.targets import ANSWER, NONE, Target


class Counters:
    """What all streams of one worker add to."""

    __slots__ = ("checked", "chunks", "coalesced_reads", "gaps", "gaps_omitted", "mismatches")

    def __init__(self) -> None:
        self.gaps = Histogram()
        self.gaps_omitted = 0
        self.coalesced_reads = 0
        self.chunks = 0
        self.checked = 0
        self.mismatches = 0


class Stream:
    """Parser and record of one response; all times are Unix ns as given to `feed`."""

    __slots__ = (
        "_at_ns",
        "_check",
        "_counters",
        "_in_read",
        "_parser",
        "_rest",
        "_target",
        "answer_ns",
        "broken",
        "chunks",
        "complete",
        "done",
        "finished",
        "first_coalesced",
        "first_ns",
        "last_event",
        "last_ns",
        "output_tokens",
        "prompt_tokens",
        "reusable",
        "status",
        "ttfb_ns",
    )

    def __init__(self, target: Target, counters: Counters, check: bool) -> None:
        """`check` compares the byte search with a full parse, chunk by chunk."""
        self._target = target
        self._counters = counters
        self._check = check
        self._parser: Any = httptools.HttpResponseParser(self)
        self._rest = b""
        self._in_read = self._at_ns = 0
        self.status = 0
        self.ttfb_ns = self.first_ns = self.answer_ns = self.last_ns = 0
        self.prompt_tokens = self.output_tokens = -1
        self.chunks = 0
        self.last_event = b""
        self.first_coalesced = self.done = self.finished = self.complete = self.reusable = False
        self.broken: str | None = None

    def feed(self, data: bytes, at_ns: int) -> None:
        """Take one read. A read with several token chunks has one time: no gaps are made up from it."""
        if not self.ttfb_ns:
            self.ttfb_ns = at_ns
        self._in_read = 0
        self._at_ns = at_ns
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.broken, self.complete = "bad_response", True
        if self._in_read:
            self._note(at_ns)

    def _note(self, at_ns: int) -> None:
        several, counters = self._in_read > 1, self._counters
        self.chunks += self._in_read
        counters.chunks += self._in_read
        if several:
            counters.coalesced_reads += 1
        if not self.first_ns:
            self.first_ns, self.first_coalesced = at_ns, several
            counters.gaps_omitted += self._in_read - 1
        elif several:
            counters.gaps_omitted += self._in_read
        else:
            counters.gaps.add(at_ns - self.last_ns)
        self.last_ns = at_ns

    def on_headers_complete(self) -> None:
        """Called by the parser: the status is known."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser with a piece of the body: cut it into events at empty lines."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self._rest = events.pop()
        for event in events:
            kind = self._target.scan(event)
            if kind == NONE:
                kind = self._parse(event)
            elif self._check:
                self._compare(event, kind)
            if kind:
                self._in_read += 1
                self.last_event = event
                if kind == ANSWER and not self.answer_ns:
                    self.answer_ns = self._at_ns

    def on_message_complete(self) -> None:
        """Called by the parser: nothing more will come for this request."""
        self.complete = True
        self.reusable = self._parser.should_keep_alive()

    def _compare(self, event: bytes, kind: int) -> None:
        self._counters.checked += 1
        if self._parse(event) != kind:
            self._counters.mismatches += 1

    def _parse(self, event: bytes) -> int:
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        payload = b"\n".join(lines)
        if payload == b"[DONE]":
            self.done = True
        if not payload or self.done:
            return NONE
        try:
            return self._take(orjson.loads(payload))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            self.broken = self.broken or "bad_chunk"
            return NONE

    def _take(self, chunk: dict[str, Any]) -> int:
        if targets.error_of(chunk) is not None:
            self.broken = self.broken or "error_in_stream"
            return NONE
        usage = chunk.get("usage")
        if usage:
            self.prompt_tokens = int(usage.get("prompt_tokens", -1))
            self.output_tokens = int(usage.get("completion_tokens", -1))
        self.finished = self.finished or targets.finished(chunk)
        return self._target.kind(chunk)

    def close(self) -> None:
        """Break the cycle with the parser; the worker runs without a garbage collector."""
        self._parser = None

    def eof(self) -> str | None:
        """The server closed the connection: why that is an error, None where it was the proper end."""
        if not self.ttfb_ns:
            return "reset"
        return self.verdict() if self.done or not _good(self.status) else "truncated"

    def verdict(self) -> str | None:
        """Why a complete response is not a good answer, None where it is one."""
        if self.status and not _good(self.status):
            return f"http_{self.status}"
        if not self.done:
            self._parse(self._rest)  # some servers leave out the last empty line,
        if not self.done and not self.finished:
            self._parse(self.last_event)  # and the last token may carry the finish reason
        if self.broken:
            return self.broken
        if not self.done and not self.finished:
            return "truncated"
        return None if self.first_ns else "no_tokens"


class PlainAnswer(Stream):
    """An answer that is no stream of tokens: what counts is its status, and that all of it came."""

    __slots__ = ("_bounded",)

    def __init__(self, target: Target, counters: Counters, check: bool) -> None:
        super().__init__(target, counters, check)
        self._bounded = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser: whether the answer says where it ends."""
        self._bounded = self._bounded or name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, data: bytes) -> None:
        """Called by the parser: what an app answers is nobody's business here."""

    def eof(self) -> str | None:
        """See `Stream`: where nothing said how long the answer is, this is its proper end."""
        if not self.status:
            return "reset"
        return "truncated" if self._bounded and _good(self.status) else self.verdict()

    def verdict(self) -> str | None:
        """See `Stream`."""
        return self.broken or (None if _good(self.status) else f"http_{self.status}")


def _good(status: int) -> bool:
    return 200 <= status < 300
