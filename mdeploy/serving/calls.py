"""Requests on their way: who waits for an answer, until when, and in what order workers get them.

All of it lives in the edge's event loop. It knows nothing of processes; time is that of the loop.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from mdeploy.serving import answers
from mdeploy.serving.backend import StreamError
from mdeploy.serving.handler import Request
from mdeploy.serving.info import Reply

_DROPPED = Request()
_STREAM_HIGH, _STREAM_LOW = 64, 16
"""Parts of a stream that may wait for a slow client before its worker is made to wait, and when it goes on."""


class Call:
    """One request and whoever waits for its answer."""

    __slots__ = (
        "_chunks",
        "_expiry",
        "_future",
        "_is_left",
        "_on_drain",
        "attempts",
        "chunks",
        "cost",
        "gone",
        "on_leave",
        "queued_at",
        "request",
        "waited_s",
    )

    def __init__(
        self, request: Request, gone: Callable[[], bool], cost: float, timeout: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.request, self.gone, self.cost = request, gone, cost
        self.attempts = 0
        self.queued_at = loop.time()
        self.waited_s = 0.0
        self.chunks: AsyncIterator[bytes] | None = None
        self._future: asyncio.Future[Reply] = loop.create_future()
        self._expiry: asyncio.TimerHandle | None = loop.call_later(timeout, self._expire, timeout)
        self._chunks: asyncio.Queue[bytes | StreamError | None] | None = None
        self.on_leave: Callable[[], None] | None = None
        """Tells the worker that has the call that nobody waits any more."""
        self._on_drain: Callable[[], None] | None = None
        self._is_left = False

    # whoever waits

    async def reply(self) -> Reply:
        """The whole answer, or the head of a stream, whose parts `chunks` has then; errors are replies too."""
        return await self._future

    async def _parts(self) -> AsyncIterator[bytes]:
        assert self._chunks is not None
        while True:
            part = await self._chunks.get()
            if self._on_drain and self._chunks.qsize() == _STREAM_LOW:
                self._on_drain()
            if part is None:
                return
            if isinstance(part, StreamError):
                raise part
            yield part

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._stop_timer()
        if not self._future.done():
            self._future.cancel()
        if self._chunks is not None:
            self._chunks.put_nowait(None)
        self._leave()

    # whoever answers

    @property
    def is_over(self) -> bool:
        """Nobody waits for a (first) answer."""
        return self._future.done()

    def answer(self, reply: Reply) -> None:
        """The whole answer; a second one is nobody's."""
        self._stop_timer()
        if self._chunks is None:
            self.on_leave = None  # it holds the batch, which holds us
        if not self._future.done():
            self._future.set_result(reply)

    def begin(self, head: Reply, on_drain: Callable[[], None]) -> bool:
        """The head of a stream; False where nobody waits any more."""
        if self._future.done():
            return False
        self._chunks, self._on_drain = asyncio.Queue(), on_drain
        self.chunks = self._parts()
        self.answer(head)
        return True

    def put(self, part: bytes) -> bool:
        """One part of the stream; True where its reader is far behind."""
        assert self._chunks is not None
        if self._is_left:
            return False
        self._chunks.put_nowait(part)
        return self._chunks.qsize() >= _STREAM_HIGH

    def close(self, error: Reply | None = None) -> None:
        """The end of the stream."""
        self.on_leave = None
        if self._on_drain:
            self._on_drain()
        if self._chunks is not None:
            self._chunks.put_nowait(StreamError(error.message, code=error.code) if error else None)

    def cut(self, error: Reply) -> None:
        """End a stream that its reader takes too slowly, so that nobody takes what there is of it for the whole."""
        self._leave()
        self.close(error)

    def _expire(self, timeout: float) -> None:
        self._expiry = None
        leave = self.on_leave
        self.answer(answers.refusal(504, f"no answer within {timeout:g} s", "timeout"))
        if leave:
            leave()

    def _leave(self) -> None:
        self._is_left = True
        self.request = _DROPPED  # its body may be large, and the queue forgets the call only when it is met
        leave, self.on_leave = self.on_leave, None
        if leave:
            leave()

    def _stop_timer(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None


@dataclass(slots=True)
class Batch:
    """Calls that went to a worker together. `left` are the positions without an answer, `streaming` those that began.

    `is_good` once a model answered any of them.
    """

    number: int
    calls: list[Call]
    sent_at: float
    left: set[int] = field(default_factory=set)
    streaming: set[int] = field(default_factory=set)
    is_good: bool = False

    def __post_init__(self) -> None:
        self.left = set(range(len(self.calls)))

    def unanswered(self) -> Iterator[Call]:
        """Calls without an answer, in their order."""
        return (self.calls[index] for index in sorted(self.left))


class Queue:
    """Calls that wait for a worker, bounded; `cost` is what they sum up to.

    Those nobody waits for any more are dropped when they are met.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: collections.deque[Call] = collections.deque()
        self._alone: collections.deque[Call] = collections.deque()
        self.cost = 0.0

    def __len__(self) -> int:
        return len(self._calls) + len(self._alone)

    @property
    def has_alone(self) -> bool:
        """Whether something waits that must not share a batch."""
        return bool(self._alone)

    @property
    def oldest(self) -> float | None:
        """When the first call was queued."""
        return self._calls[0].queued_at if self._calls else None

    def push(self, call: Call) -> bool:
        """Add a call; False where there is no room."""
        if len(self) >= self._size:
            self.sweep()
            if len(self) >= self._size:
                return False
        self._calls.append(call)
        self.cost += call.cost
        return True

    def push_back(self, calls: list[Call]) -> None:
        """Calls that were taken and not worked on go back to the front, in their order; there is always room."""
        self._calls.extendleft(reversed(calls))
        self.cost += sum(call.cost for call in calls)

    def push_alone(self, call: Call) -> None:
        """A call that may have killed its worker: it goes next, and with nobody else."""
        self._alone.append(call)

    def sweep(self) -> None:
        """Drop what nobody waits for."""
        self._calls = collections.deque(call for call in self._calls if not _is_dead(call))
        self.cost = sum(call.cost for call in self._calls)

    def take(self, most: int, most_cost: float | None) -> list[Call]:
        """The next batch: at most so many calls, and so much cost (one call alone may cost more)."""
        while self._alone:
            call = self._alone.popleft()
            if not _is_dead(call):
                return [call]
        taken: list[Call] = []
        cost = 0.0
        while self._calls and len(taken) < most:
            call = self._calls[0]
            if _is_dead(call):
                self._pop()
                continue
            cost += call.cost
            if taken and most_cost is not None and cost > most_cost:
                break
            taken.append(self._pop())
        return taken

    def _pop(self) -> Call:
        call = self._calls.popleft()
        self.cost = self.cost - call.cost if self._calls else 0.0  # no rounding is carried on
        return call

    def fills(self, batches: int, most: int, most_cost: float | None) -> bool:
        """Whether what waits is enough for so many full batches."""
        return len(self) >= most * batches or (most_cost is not None and self.cost >= most_cost * batches)

    def drain(self) -> list[Call]:
        """Everything, for an end."""
        calls = [*self._alone, *self._calls]
        self._alone.clear()
        self._calls.clear()
        self.cost = 0.0
        return calls


def _is_dead(call: Call) -> bool:
    """Answered by its deadline, or the client left: no model shall see it."""
    if call.is_over:
        return True
    if call.gone():
        call.cancel()
        return True
    return False
