"""A handler on a cluster as the edge sees it: one lane of the dispatcher for each replica that runs.

What Ray knows of replicas comes in as `Seen`; batches go out through a handle of Ray Serve, each to the replica the
dispatcher chose. Deadlines, the bound of the queue and second attempts are the dispatcher's, as for local workers.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mdeploy.serving.backend import Observer
from mdeploy.serving.calls import Batch
from mdeploy.serving.cluster_replica import Done
from mdeploy.serving.dispatch import Dispatched, Dispatcher
from mdeploy.serving.info import HandlerInfo, Reply, WorkerState
from mdeploy.serving.runner import Answered, Chunk, Event

_GRACE_S = 10.0
"""What a batch may take beside the handler's own deadline before its replica is given up as lost."""

_COOLING_S = 5.0
"""How long a replica that failed us, but lives, gets nothing."""

_DEAD = ("ActorDiedError", "RayActorError")
"""Ray's errors for a process that is gone for good, though Ray may list it for some seconds yet."""

_RUNNING = ("RUNNING", "UPDATING")
_STATES = {"STOPPING": "retiring", "STOPPED": "stopped"}


Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """One replica as Ray tells of it."""

    id: str
    node: str
    pid: int
    state: str


class ReplicaLane:
    """One replica; a lane of the dispatcher."""

    def __init__(self, state: WorkerState, seen: Seen, handle: Any, dispatcher: Dispatcher, say: Say) -> None:
        self.seen, self._state = seen, state
        self._handle, self._dispatcher, self._say = handle, dispatcher, say
        self.outstanding: collections.deque[Batch] = collections.deque()
        self.freed_at = 0.0
        self.accepts = True
        self.is_lost = self.is_dead = False
        self.lost_at = 0.0
        self.requests = self.gpu_bytes = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._readable = asyncio.Event()
        self._readable.set()

    def send(self, batch: Batch) -> None:
        """See `Lane`."""
        self.requests += len(batch.calls)
        self._tasks[batch.number] = asyncio.get_running_loop().create_task(self._run(batch))

    def cancel(self, batch: Batch, index: int) -> None:
        """See `Lane`. Streams end once nobody reads any of a batch; a forward under way cannot be stopped."""
        self._readable.set()
        if batch.streaming and batch.left <= {index} and batch.number in self._tasks and not self.is_lost:
            self._dispatcher.closed(self, batch.number, index, None)
            self._dispatcher.done(self, batch.number, 0.0)
            self._tasks.pop(batch.number).cancel()

    def pause(self) -> None:
        """See `Lane`."""
        self._readable.clear()

    def resume(self) -> None:
        """See `Lane`."""
        self._readable.set()

    def give_up(self) -> None:
        """The replica is gone: what it had is tried elsewhere."""
        if not self.is_lost:
            self.is_lost, self.accepts = True, False
            self.lost_at = asyncio.get_running_loop().time()
            for task in self._tasks.values():
                task.cancel()
            self._dispatcher.lost(self)

    async def _run(self, batch: Batch) -> None:
        """One batch, from the call to its last event. What ends it early ends the lane: the dispatcher tries again."""
        requests = [call.request for call in batch.calls]
        response = self._handle.remote(requests, replica=self.seen.id)
        try:
            while True:
                event = await asyncio.wait_for(anext(response), self._dispatcher.info.timeout + _GRACE_S)
                if isinstance(event, Done):
                    break
                await self._pass_on(batch, event)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # Ray's and the network's: there is no end of kinds
            response.cancel()
            self._say(f"replica {self.seen.id} on {self.seen.node} failed: {_first_line(error)}")
            self._tasks.pop(batch.number, None)
            self.is_dead = type(error).__name__ in _DEAD
            self.give_up()
            return
        self.gpu_bytes = event.gpu_bytes
        self._tasks.pop(batch.number, None)
        self._dispatcher.done(self, batch.number, event.seconds)

    async def _pass_on(self, batch: Batch, event: Event) -> None:
        if isinstance(event, Answered):
            self._dispatcher.replied(self, batch.number, event.replies)
        elif isinstance(event, Chunk):
            self._dispatcher.streamed(self, batch.number, event.index, event.data, event.head)
            await self._readable.wait()
        else:
            self._dispatcher.closed(self, batch.number, event.index, event.error)

    @property
    def may_return(self) -> bool:
        """Whether a replica that failed us may be tried once more."""
        is_cool = asyncio.get_running_loop().time() - self.lost_at > _COOLING_S
        return self.is_lost and not self.is_dead and is_cool

    def state(self) -> WorkerState:
        """How it is."""
        word: Any = "stopped" if self.is_lost else "busy" if self.outstanding else "ready"
        word = word if self.accepts or self.is_lost else "retiring"
        return replace(self._state, state=word, requests=self.requests, gpu_memory_bytes=self.gpu_bytes)

    @property
    def generation(self) -> int:
        """See `WorkerState`."""
        return self._state.generation


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class ClusterBackend(Dispatched):
    """All replicas of one handler (a Backend)."""

    def __init__(self, info: HandlerInfo, handle: Any, observer: Observer, say: Say, *, on_gpu: bool) -> None:
        self._dispatcher, self._handle = Dispatcher(info, observer), handle
        self._observer, self._say = observer, say
        self._kind = "gpu" if on_gpu else "cpu"
        self._lanes: dict[str, ReplicaLane] = {}
        self._others: tuple[WorkerState, ...] = ()
        self._generations: dict[str, int] = {}
        self.generation = 1

    # Backend

    def workers(self) -> tuple[WorkerState, ...]:
        """Every replica there is."""
        return (*(lane.state() for lane in self._lanes.values()), *self._others)

    # what Ray tells

    def update(self, seen: Mapping[str, Seen]) -> None:
        """Bring the lanes to what Ray knows of the replicas."""
        for one in seen.values():
            self._generations.setdefault(one.id, self.generation)
        running = {one.id: one for one in seen.values() if one.state in _RUNNING}
        for id_, lane in list(self._lanes.items()):
            lane.accepts = id_ in running and not lane.is_lost
            if id_ not in seen:
                self._drop(lane)
            elif lane.may_return:
                self._admit(lane.seen)
            elif not lane.accepts and not lane.outstanding:
                self._dispatch.remove(lane)
        for id_, one in running.items():
            if id_ not in self._lanes:
                self._admit(one)
        self._others = tuple(self._idle(one) for one in seen.values() if one.id not in self._lanes)

    def _admit(self, one: Seen) -> None:
        lane = ReplicaLane(self._idle(one), one, self._handle, self._dispatch, self._say)
        self._lanes[one.id] = lane
        self._dispatch.add(lane)

    def _drop(self, lane: ReplicaLane) -> None:
        """Ray has forgotten the replica."""
        del self._lanes[lane.seen.id]
        lane.give_up()
        is_old = lane.generation < self.generation
        self._observer.restarted(self.info.name, "rolling" if is_old else "crash")

    def _idle(self, one: Seen) -> WorkerState:
        word: Any = _STATES.get(one.state, "starting")
        return WorkerState(one.pid, f"{one.node}/{self._kind}", self._generations[one.id], word)

    @property
    def lives(self) -> bool:
        """Whether any replica can answer."""
        return any(not lane.is_lost for lane in self._lanes.values())

    def is_renewed(self, target: int) -> bool:
        """Whether every replica is of the newest generation, and there are as many as there shall be."""
        lanes = [lane for lane in self._lanes.values() if lane.generation == self.generation]
        return len(lanes) == len(self._lanes) >= target

    def close(self, why: Reply) -> None:
        """Let go of all replicas; what they had, what waits and what comes is answered with `why`."""
        self._dispatch.fail_all(why)
        for lane in self._lanes.values():
            lane.give_up()
        self._lanes.clear()
        self._dispatch.fail_all(why)
