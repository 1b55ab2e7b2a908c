"""One handler's requests to whatever works on them: batching, retries, pace. Local and Ray workers are both lanes.

A lane takes one batch at a time and holds at most one more, so that it need not wait for us between two. What it
reports (replies, parts of streams, its death) comes in through the methods of Dispatcher.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mdeploy.serving import answers
from mdeploy.serving.backend import Observer, OverloadedError
from mdeploy.serving.calls import Batch, Call, Queue
from mdeploy.serving.handler import Request
from mdeploy.serving.info import HandlerInfo, Reply

_OUTSTANDING = 2
_ATTEMPTS = 2
"""Workers one request may be in when they die, before it is taken for the cause."""

_PATIENCE, _PATIENCE_S = 0.2, 0.01
"""How long a worker that just got free waits for a batch like the last ones: this share of their time, at most so long.

Clients that ask again as soon as they are answered come back one after the other, over some milliseconds."""

_PACE = 0.2
"""Weight of the newest batch in moving averages."""

_RETRY_AFTER_S = (1.0, 60.0)


class Lane(Protocol):
    """One worker as the dispatcher sees it, which keeps `outstanding` and, in the loop's time, `freed_at`."""

    outstanding: collections.deque[Batch]
    accepts: bool
    freed_at: float

    def send(self, batch: Batch) -> None:
        """Hand a batch over."""

    def cancel(self, batch: Batch, index: int) -> None:
        """Nobody waits for this answer any more, or reads this stream."""

    def pause(self) -> None:
        """A stream's reader is far behind: take no more parts for now."""

    def resume(self) -> None:
        """Go on."""


class Dispatcher:
    """The queue of one handler and the lanes it is shared out to."""

    def __init__(self, info: HandlerInfo, observer: Observer) -> None:
        self.info, self._observer = info, observer
        self._loop = asyncio.get_running_loop()
        self._queue = Queue(info.queue_size)
        self._lanes: list[Lane] = []
        self._numbers = 0
        self._scheduled = False
        self._linger: asyncio.TimerHandle | None = None
        self._seconds_each = self._usual_size = self._usual_s = 0.0
        self._closing: Reply | None = None
        self.answered_at = 0.0

    # in

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Requests that workers have."""
        return sum(len(batch.left) for lane in self._lanes for batch in lane.outstanding)

    def submit(self, request: Request, gone: Callable[[], bool], cost: float = 0.0) -> Call:
        """Queue a request; workers split by cost whatever is not known of it here. Raises OverloadedError."""
        call = Call(request, gone, cost, self.info.timeout, self._loop)
        if self._closing is not None:
            call.answer(self._closing)
        elif self._queue.push(call):
            self._soon()
        else:
            call.cancel()
            raise OverloadedError(self._wait_s())
        return call

    def _wait_s(self) -> float:
        """When the queue will have moved on by a tenth, by the pace of late."""
        low, high = _RETRY_AFTER_S
        return min(high, max(low, math.ceil(self._seconds_each * len(self._queue) / 10)))

    # lanes

    def add(self, lane: Lane) -> None:
        """A worker is ready."""
        self._lanes.append(lane)
        self._soon()

    def remove(self, lane: Lane) -> None:
        """A worker is gone, in order."""
        if lane in self._lanes:
            self._lanes.remove(lane)

    def lost(self, lane: Lane) -> None:
        """A worker died: what it was at is tried once more, each request alone; what only waited there, as before."""
        self.remove(lane)
        batches, lane.outstanding = list(lane.outstanding), collections.deque()
        for batch in reversed(batches[1:]):
            self._queue.push_back([call for call in batch.unanswered() if not call.is_over])
        for batch in batches[:1]:
            for index in sorted(batch.left):
                self._try_again(batch.calls[index], streamed=index in batch.streaming)
        if self._closing is not None:
            self.fail_all(self._closing)
        self._soon()

    def _try_again(self, call: Call, *, streamed: bool) -> None:
        call.attempts += 1
        if streamed:
            call.close(answers.refusal(500, "the worker died in the middle of this answer", "worker_died"))
        elif call.attempts >= _ATTEMPTS:
            text = f"{call.attempts} workers died with this request; it is not tried again"
            call.answer(answers.refusal(500, text, "worker_died"))
        elif not call.is_over:
            self._queue.push_alone(call)

    def fail_all(self, reply: Reply) -> None:
        """Answer everything that waits, and all that is to come, with an error."""
        self._closing = reply
        for call in self._queue.drain():
            call.answer(reply)

    # out

    def _soon(self) -> None:
        """Once for all requests that arrive in the same turn of the event loop."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._share_out)

    def _share_out(self) -> None:
        self._scheduled = False
        while self._queue:
            idle = [lane for lane in self._lanes if lane.accepts and not lane.outstanding]
            lane = self._due(idle) if idle else self._next_but_one()
            if lane is None:
                return
            share = max(math.ceil(len(self._queue) / max(len(idle), 1)), round(self._usual_size))
            calls = self._queue.take(min(share, self.info.max_batch_size), self.info.max_batch_cost)
            if calls:
                self._send(lane, calls)

    def _due(self, idle: Sequence[Lane]) -> Lane | None:
        """The worker that was idle for longest; None where a fuller batch is better a little later."""
        lane = min(idle, key=lambda each: each.freed_at)
        oldest = self._queue.oldest
        if oldest is None or self._queue.has_alone or self._fills(len(idle)):
            return lane
        due = oldest + self.info.max_wait_ms / 1000
        if len(self._queue) < round(self._usual_size):
            due = max(due, lane.freed_at + min(_PATIENCE * self._usual_s, _PATIENCE_S))
        if self._loop.time() >= due:
            return lane
        if self._linger is None:
            self._linger = self._loop.call_at(due, self._lingered)
        return None

    def _fills(self, batches: int) -> bool:
        return self._queue.fills(batches, self.info.max_batch_size, self.info.max_batch_cost)

    def _lingered(self) -> None:
        self._linger = None
        self._share_out()

    def _next_but_one(self) -> Lane | None:
        """A busy worker that may have a second batch: a full one, while there is one for each that has none."""
        hungry = [lane for lane in self._lanes if lane.accepts and len(lane.outstanding) < _OUTSTANDING]
        if not hungry or self._queue.has_alone or not self._fills(len(hungry)):
            return None
        return min(hungry, key=lambda lane: lane.outstanding[0].sent_at)  # the first that will be through

    def _send(self, lane: Lane, calls: list[Call]) -> None:
        now = self._loop.time()
        self._numbers += 1
        batch = Batch(self._numbers, calls, now)
        for index, call in enumerate(calls):
            call.waited_s = now - call.queued_at
            call.on_leave = functools.partial(lane.cancel, batch, index)
            self._observer.waited(self.info.name, call.waited_s)
        lane.outstanding.append(batch)
        try:
            lane.send(batch)
        except OSError as error:  # no descriptor or no memory left for what is large
            lane.outstanding.remove(batch)
            text = f"the request cannot be handed to a worker: {error.strerror}"
            for call in calls:
                call.answer(answers.refusal(503, text, "overloaded", (("Retry-After", "1"),)))

    # back

    def replied(self, lane: Lane, number: int, replies: Sequence[tuple[int, Reply]]) -> None:
        """Some requests of a batch are answered."""
        batch = _of(lane, number)
        for index, reply in replies:
            batch.left.discard(index)
            batch.calls[index].answer(reply)
        if any(reply.status < 400 for _, reply in replies):
            batch.is_good = True
            self.answered_at = time.monotonic()

    def streamed(self, lane: Lane, number: int, index: int, part: bytes, head: Reply | None) -> None:
        """One part of a stream; the first one comes with its head."""
        batch = _of(lane, number)
        call = batch.calls[index]
        if head is not None:
            batch.streaming.add(index)
            batch.is_good = True
            self.answered_at = time.monotonic()
            if not call.begin(head, lane.resume):
                return
        if call.chunks is not None and part and call.put(part):
            lane.pause()

    def closed(self, lane: Lane, number: int, index: int, error: Reply | None) -> None:
        """A stream is over."""
        batch = _of(lane, number)
        batch.left.discard(index)
        batch.calls[index].close(error)

    def done(self, lane: Lane, number: int, seconds: float) -> None:
        """A worker is through with a batch and takes the next."""
        batch = _of(lane, number)
        lane.outstanding.remove(batch)
        lane.freed_at = self._loop.time()
        self._usual_size += _PACE * (len(batch.calls) - self._usual_size)
        self._usual_s += _PACE * (seconds - self._usual_s)
        each = seconds / len(batch.calls) / max(len(self._lanes), 1)
        self._seconds_each += _PACE * (each - self._seconds_each)
        if batch.is_good:
            self._observer.batch(self.info.name, len(batch.calls), seconds)
        if lane.outstanding:
            lane.outstanding[0].sent_at = self._loop.time()  # only now is it worked on
        self._soon()


class Dispatched:
    """What of a Backend its dispatcher answers; whoever makes the dispatcher puts it into `_dispatcher`."""

    _dispatcher: Dispatcher | None = None

    @property
    def _dispatch(self) -> Dispatcher:
        if self._dispatcher is None:
            raise RuntimeError("nothing has started yet")
        return self._dispatcher

    @property
    def info(self) -> HandlerInfo:
        """What the handler says of itself; known once it has started."""
        return self._dispatch.info

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._dispatch.queued

    @property
    def in_flight(self) -> int:
        """Requests that workers have."""
        return self._dispatch.in_flight

    @property
    def answered_at(self) -> float:
        """time.monotonic() of the last good answer; 0.0 before the first."""
        return self._dispatch.answered_at

    def submit(self, request: Request, gone: Callable[[], bool], cost: float = 0.0) -> Call:
        """Queue a request. Raises OverloadedError."""
        return self._dispatch.submit(request, gone, cost)


def _of(lane: Lane, number: int) -> Batch:
    return next(batch for batch in lane.outstanding if batch.number == number)
