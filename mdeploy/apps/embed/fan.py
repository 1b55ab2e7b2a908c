"""One request's inputs as pieces of work, so that batches are full and no request holds up the others.

A worker's batch has a budget of tokens. Pieces are a quarter of it: those of several requests share a batch. What is
more than a batch (a large request) goes through a gate that all large requests share: only as much of them is under
way as keeps the workers busy, and a single text that comes then waits for no more than that.
"""

from __future__ import annotations

import asyncio
import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from mdeploy.apps.embed.inputs import Inputs, Load
from mdeploy.serving.backend import Backend, Call, OverloadedError
from mdeploy.serving.exchange import Exchange
from mdeploy.serving.handler import Buffer, HTTPError, Request
from mdeploy.serving.info import Reply

_BUDGET = 4096
"""Tokens of a batch where the handler does not say."""

_SHARE = 4
"""Pieces in a batch."""

_MOST = 64
"""Inputs in a piece: its vectors are written as JSON in one go, in the event loop."""

_AHEAD = 3
"""Batches of large requests under way for each worker: one it works on, one it has, one that is ready for it."""

_QUEUE = 64
"""Batches that may wait for each worker; more are refused at once."""

_LEAST = 1 / 8
"""Share of them that always may: the pace that was measured at start may have been that of a bad moment."""

_LARGE_AT_ONCE = 2
"""Large requests that a worker's batches are shared by; the others follow in the order they came, so that those that
came first are done before their clients give up."""

_LARGE_TIMEOUTS = 2.0
"""Deadlines of a single text that large requests may have work ahead for."""

_LONG_TOKEN = 8
"""Characters of a token, at most: how many tokens a text has at least, before it is taken apart."""

_LONGEST_RETRY_S = 60.0

_Part = TypeVar("_Part")
Take = Callable[[int, Buffer, int], _Part]
"""What to make of the answer to a piece: the number of its first input, the bytes, how many inputs it has."""


class Fan:
    """Everything that one backend is asked."""

    def __init__(self, backend: Backend, inputs: Inputs, registry: CollectorRegistry) -> None:
        self._backend, self._inputs = backend, inputs
        self._workers = max(1, len(backend.workers()))
        self._gate = Gate()
        self._turns = asyncio.Semaphore(_LARGE_AT_ONCE * self._workers)
        self._waiting = {False: 0, True: 0}
        name = (backend.info.name,)
        labels = ("handler",)
        self._inputs_total = Counter("mdeploy_inputs", "Inputs answered", labels, registry=registry).labels(*name)
        self._tokens_total = Counter("mdeploy_input_tokens", "Their tokens", labels, registry=registry).labels(*name)
        gauge = Gauge("mdeploy_tokens_waiting", "Tokens of requests without an answer", labels, registry=registry)
        gauge.labels(*name).set_function(lambda: sum(self._waiting.values()))

    def expect(self, values: Sequence[Any]) -> None:
        """Refuse texts by their size alone, before the work of taking them apart. Raises OverloadedError."""
        tokens = sum(len(value) for value in values if isinstance(value, str)) / _LONG_TOKEN
        if tokens > self._budget:
            self._check(tokens, is_large=True)

    async def run(self, exchange: Exchange, loads: Sequence[Load], dim: int, take: Take[_Part]) -> list[_Part]:
        """What `take` makes of each piece's answer, in order.

        Raises HTTPError with the status of a piece that failed, OverloadedError where too much waits already. Is
        cancelled when the client leaves.
        """
        exchange.handler = self._backend.info.name
        costs = [self._inputs.tokens(load) for load in loads]
        total, budget = sum(costs), self._budget
        is_large = total > budget
        self._check(total, is_large=is_large)
        self._waiting[is_large] += total
        try:
            pieces = [_Piece(start, loads[start:end], sum(costs[start:end])) for start, end in split(costs, budget)]
            ask = _Asked(self, exchange, dim, take)
            if is_large:
                async with self._turns:
                    parts = await ask.through(self._gate, pieces, self._ahead)
            else:
                parts = await ask.at_once(pieces)
        finally:
            self._waiting[is_large] -= total
        self._inputs_total.inc(len(loads))
        self._tokens_total.inc(total)
        return parts

    def submit(self, piece: _Piece, dim: int, exchange: Exchange) -> Call:
        """Raises OverloadedError."""
        body = self._inputs.pack(piece.loads, dim)
        return self._backend.submit(Request(body=body, id=exchange.id), exchange.gone, piece.tokens)

    @property
    def _budget(self) -> float:
        return self._backend.info.max_batch_cost or _BUDGET

    @property
    def _ahead(self) -> float:
        """Tokens of large requests that may be under way."""
        return _AHEAD * self._budget * self._workers

    def _check(self, tokens: float, *, is_large: bool) -> None:
        """Large requests and the others have a limit each: neither shuts the other out. Raises OverloadedError.

        What could not be answered in time is better refused at once.
        """
        waiting, info = self._waiting[is_large], self._backend.info
        limit = _QUEUE * self._budget * self._workers
        rate = float(info.facts.get("tokens_per_s") or 0) * self._workers
        if rate and is_large:
            limit = max(rate * info.timeout * _LARGE_TIMEOUTS, 2 * self._ahead)
        elif rate:
            limit = min(limit, max(rate * info.timeout / 2, limit * _LEAST))
        if waiting and waiting + tokens > limit:
            raise OverloadedError(min(_LONGEST_RETRY_S, waiting / rate / 4) if rate else 1.0)


class _Piece:
    """Some inputs of one request: `start` is the number of the first."""

    __slots__ = ("loads", "start", "tokens")

    def __init__(self, start: int, loads: Sequence[Load], tokens: int) -> None:
        self.start, self.loads, self.tokens = start, loads, tokens


class _Asked(Generic[_Part]):
    """One request on its way."""

    def __init__(self, fan: Fan, exchange: Exchange, dim: int, take: Take[_Part]) -> None:
        self._fan, self._exchange, self._dim, self._take = fan, exchange, dim, take

    async def at_once(self, pieces: Sequence[_Piece]) -> list[_Part]:
        """A small request: everything goes into the queue."""
        calls: list[Call] = []
        try:
            for piece in pieces:
                calls.append(self._fan.submit(piece, self._dim, self._exchange))
            return [await self._answer(piece, call) for piece, call in zip(pieces, calls, strict=True)]
        except BaseException:
            for call in calls:
                call.cancel()
            raise

    async def through(self, gate: Gate, pieces: Sequence[_Piece], limit: float) -> list[_Part]:
        """A large one: a few pieces at a time, in turn with other large ones."""
        parts: list[_Part | None] = [None] * len(pieces)
        left = iter(enumerate(pieces))

        async def pump() -> None:
            for index, piece in left:
                await gate.enter(piece.tokens, limit)
                try:
                    [parts[index]] = await self.at_once([piece])
                finally:
                    gate.leave(piece.tokens)

        mean = sum(piece.tokens for piece in pieces) / len(pieces)
        pumps = [asyncio.create_task(pump()) for _ in range(min(len(pieces), math.ceil(limit / mean)))]
        try:
            await asyncio.gather(*pumps)
        finally:
            await _end(pumps)
        return [part for part in parts if part is not None]

    async def _answer(self, piece: _Piece, call: Call) -> _Part:
        reply = await call.reply()
        self._exchange.waited_s = max(self._exchange.waited_s, call.waited_s)
        if reply.status != 200:
            raise refused(reply)
        return self._take(piece.start, reply.body, len(piece.loads))


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel what is left of them. The list is emptied: an error in it holds the frame that holds the list."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


def refused(reply: Reply) -> HTTPError:
    """A worker's error as the client gets it."""
    return HTTPError(reply.status, reply.message, code=reply.code, headers=dict(reply.headers))


def split(costs: Sequence[int], budget: float) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours, each a quarter of a batch at most where it has more than one input."""
    most = budget / _SHARE
    start = 0
    total = 0
    for index, cost in enumerate(costs):
        if index > start and (total + cost > most or index - start == _MOST):
            yield start, index
            start, total = index, 0
        total += cost
    yield start, len(costs)


class Gate:
    """Lets in what asks, in the order it asked, while the sum of what is inside stays below a limit."""

    def __init__(self) -> None:
        self._inside = 0.0
        self._waiting: collections.deque[tuple[asyncio.Future[None], float, float]] = collections.deque()

    async def enter(self, size: float, limit: float) -> None:
        """Wait for room; what is larger than the limit goes in alone."""
        if not self._waiting and self._has_room(size, limit):
            self._inside += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size, limit))
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave(size)
            raise

    def leave(self, size: float) -> None:
        """Make room."""
        self._inside -= size
        while self._waiting:
            turn, size, limit = self._waiting[0]
            if not turn.done():
                if not self._has_room(size, limit):
                    return
                self._inside += size
                turn.set_result(None)
            self._waiting.popleft()

    def _has_room(self, size: float, limit: float) -> bool:
        return not self._inside or self._inside + size <= limit
