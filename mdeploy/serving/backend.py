"""What stands between the HTTP edge and whoever runs a handler: local worker processes or a Ray cluster.

The edge knows nothing of processes, a backend nothing of HTTP connections. Nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from mdeploy.serving.handler import Request
from mdeploy.serving.info import HandlerInfo, Reply, WorkerState


class OverloadedError(Exception):
    """The queue is full; `retry_after_s` is a guess of when it is worth to ask again."""

    def __init__(self, retry_after_s: float = 1.0, message: str = "the service is overloaded, try again later") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StreamError(Exception):
    """A streamed answer broke off after its head was sent; the message goes to the client."""

    def __init__(self, message: str, *, code: str = "stream_failed") -> None:
        super().__init__(message)
        self.message, self.code = message, code


class Call(Protocol):
    """One request on its way. Errors (400 to 504) are replies, never exceptions.

    `chunks` is valid after `reply`: None for a whole answer. `waited_s` is what the request spent in the queue.
    """

    chunks: AsyncIterator[bytes] | None
    waited_s: float

    async def reply(self) -> Reply:
        """The whole answer, or the head of a stream."""

    def cancel(self) -> None:
        """Nobody waits any more; may be called at any time, more than once."""


class Backend(Protocol):
    """Everything that runs one handler."""

    @property
    def info(self) -> HandlerInfo:
        """What the handler says of itself."""

    @property
    def queued(self) -> int:
        """Requests that wait."""

    @property
    def in_flight(self) -> int:
        """Requests that workers have."""

    @property
    def answered_at(self) -> float:
        """time.monotonic() of the last answer a model gave; 0.0 before the first."""

    def submit(self, request: Request, gone: Callable[[], bool], cost: float = 0.0) -> Call:
        """Take a request in. Raises OverloadedError.

        `gone` tells that the client left: the request is dropped before a model sees it. `cost` counts against the
        handler's max_batch_cost, where it is known here already.
        """

    def workers(self) -> tuple[WorkerState, ...]:
        """Every worker there is now."""


class Observer(Protocol):
    """Who counts what backends do. Called in the event loop; every method is cheap."""

    def batch(self, handler: str, size: int, seconds: float) -> None:
        """A model answered `size` requests together. Batches that failed as a whole are not told."""

    def waited(self, handler: str, seconds: float) -> None:
        """A request left the queue after this long."""

    def restarted(self, handler: str, reason: str) -> None:
        """A worker is replaced: crash, hang, startup or rolling."""
