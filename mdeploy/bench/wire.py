"""What the parent and its load workers say to each other: length-prefixed pickles over pipes.

Down: a `Job`, later one empty line for "go"; a closed pipe means "stop now", also when the parent
was killed. Up: READY, then a tick of counts now and then, then one `WorkerReport`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from mdeploy.bench.stats import Histogram
from mdeploy.bench.types import LoadPlan, Sample

READY = "ready"
GO = b"\n"
CANCELLED = "cancelled"
"""The `error` of a sample whose request an interrupt cut off."""
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One worker's part: requests number `first`, `first + stride`, …, at most `requests` of them."""

    plan: LoadPlan
    concurrency: int
    requests: int | None
    first: int
    stride: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Counts of one worker so far."""

    running: int
    completed: int
    failed: int
    chunks: int


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """All a worker measured. Times are Unix ns; `drain_ns` is when it had nothing more to start."""

    start_ns: int
    drain_ns: int
    end_ns: int
    samples: list[Sample]
    gaps: Histogram
    lag: Histogram
    cpu_share: float
    reads: int
    unstamped_reads: int
    coalesced_reads: int
    gaps_omitted: int
    checked: int
    mismatches: int
    clock_step_ns: int
    realtime: bool


def frame(message: Any) -> bytes:
    """A message as bytes."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


def read_frame(stream: BinaryIO) -> Any:
    """Wait for one message; raises EOFError when the other side is gone."""
    size = int.from_bytes(_exactly(stream, _LENGTH_BYTES), "big")
    return pickle.loads(_exactly(stream, size))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


class Frames:
    """Cuts a byte stream that arrives in pieces into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take a piece, give the messages it completes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            yield pickle.loads(payload)
