"""Which workers a controller has, and which of them gets the next request. Pure: no sockets, the clock is given.

A worker joins by its heartbeats. One that fails at a request is only suspected; it leaves the rotation when its health
check fails as well, comes back when that succeeds, and is forgotten when it is silent for long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

SILENT_S = 6.0
"""A worker that was not heard for so long is checked (it beats every 2 s)."""

FORGOTTEN_S = 60.0
"""One that is out of the rotation and was not heard for so long is gone for good."""


@dataclass(eq=False, slots=True)
class Worker:
    """One worker process, at its address. `is_up` while it is in the rotation."""

    address: str
    name: str
    heard: float
    is_up: bool = False
    suspected: bool = True
    in_flight: int = 0
    requests: int = 0
    picked: int = 0


class Fleet:
    """All workers of a controller."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._picks = 0

    def __len__(self) -> int:
        return len(self._workers)

    def of(self, name: str) -> tuple[Worker, ...]:
        """Every worker of a model."""
        return tuple(worker for worker in self._workers.values() if worker.name == name)

    def heard(self, address: str, name: str) -> Worker:
        """A heartbeat: a new worker, or one more sign of life. A new one is suspected until it was checked."""
        worker = self._workers.get(address)
        if worker is None or worker.name != name:
            worker = self._workers[address] = Worker(address, name, self._clock())
        worker.heard = self._clock()
        return worker

    def left(self, address: str) -> None:
        """A worker says that it ends; what it is at, it finishes."""
        self._workers.pop(address, None)

    def pick(self, name: str, tried: Collection[Worker] = ()) -> Worker | None:
        """The worker with the fewest requests, of equals the one that waited longest; suspects only for want of others.

        Those in `tried` are left out.
        """
        able = [worker for worker in self.of(name) if worker.is_up and worker not in tried]
        if not able:
            return None
        best = min(able, key=lambda worker: (worker.suspected, worker.in_flight, worker.picked))
        self._picks += 1
        best.picked = self._picks
        best.requests += 1
        return best

    def failed(self, worker: Worker) -> None:
        """A request to it broke off: check it soon."""
        worker.suspected = True

    def checked(self, worker: Worker, *, is_healthy: bool) -> None:
        """What its health check said."""
        worker.is_up, worker.suspected = is_healthy, not is_healthy

    def due(self) -> tuple[Worker, ...]:
        """Workers to check now; those that are gone for good are dropped first."""
        now = self._clock()
        for worker in tuple(self._workers.values()):
            if not worker.is_up and now - worker.heard > FORGOTTEN_S:
                self.left(worker.address)
        return tuple(w for w in self._workers.values() if w.suspected or not w.is_up or now - w.heard > SILENT_S)
