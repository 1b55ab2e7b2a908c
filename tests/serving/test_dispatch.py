"""Who gets what, when: batches, turns, retries. The lanes here record what they are given; no process runs."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mdeploy.serving.backend import OverloadedError
from mdeploy.serving.calls import Batch, Call
from mdeploy.serving.dispatch import Dispatcher
from mdeploy.serving.handler import Request
from mdeploy.serving.info import HandlerInfo, Reply

OK = Reply(200, "x", b"ok")


class Observer:
    def __init__(self) -> None:
        self.batches: list[int] = []

    def batch(self, handler: str, size: int, seconds: float) -> None:
        self.batches.append(size)

    def waited(self, handler: str, seconds: float) -> None:
        assert seconds >= 0

    def restarted(self, handler: str, reason: str) -> None:
        raise AssertionError(reason)


class Lane:
    def __init__(self) -> None:
        self.outstanding: collections.deque[Batch] = collections.deque()
        self.accepts = True
        self.freed_at = 0.0
        self.sent: list[list[str]] = []
        self.cancelled: list[tuple[int, int]] = []
        self.paused = False

    def send(self, batch: Batch) -> None:
        self.sent.append([call.request.id for call in batch.calls])

    def cancel(self, batch: Batch, index: int) -> None:
        self.cancelled.append((batch.number, index))

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Bench:
    """A dispatcher, its lanes, and short words for what happens to them."""

    def __init__(self, lanes: int = 1, **info: Any) -> None:
        self.observer = Observer()
        self.dispatcher = Dispatcher(HandlerInfo("m", "/m", **info), self.observer)
        self.lanes = [Lane() for _ in range(lanes)]
        for lane in self.lanes:
            self.dispatcher.add(lane)

    def ask(self, *ids: str, gone: Callable[[], bool] = lambda: False, cost: float = 1.0) -> list[Call]:
        return [self.dispatcher.submit(Request(id=i), gone, cost) for i in ids]

    async def turn(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def finish(self, lane: Lane) -> None:
        batch = lane.outstanding[0]
        self.dispatcher.replied(lane, batch.number, [(i, OK) for i in sorted(batch.left)])
        self.dispatcher.done(lane, batch.number, 0.01)
        await self.turn()


def history(play: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(play(), 20))


def test_what_arrives_in_one_turn_is_one_batch() -> None:
    async def play() -> None:
        bench = Bench(max_batch_size=8)
        bench.ask("a", "b", "c")
        await bench.turn()
        assert bench.lanes[0].sent == [["a", "b", "c"]]
        await bench.finish(bench.lanes[0])
        assert bench.observer.batches == [3]

    history(play)


def test_idle_workers_share_what_there_is() -> None:
    async def play() -> None:
        bench = Bench(lanes=2, max_batch_size=8)
        bench.ask(*"abcde")
        await bench.turn()
        assert sorted(len(lane.sent[0]) for lane in bench.lanes) == [2, 3]

    history(play)


def test_a_busy_worker_gets_a_second_batch_only_when_it_is_full() -> None:
    async def play() -> None:
        bench = Bench(max_batch_size=2)
        bench.ask("a")
        await bench.turn()
        bench.ask("b")
        await bench.turn()
        assert bench.lanes[0].sent == [["a"]]
        bench.ask("c", "d", "e")
        await bench.turn()
        assert bench.lanes[0].sent == [["a"], ["b", "c"]]
        await bench.finish(bench.lanes[0])
        assert bench.lanes[0].sent == [["a"], ["b", "c"], ["d", "e"]]

    history(play)


def test_an_idle_worker_never_waits_while_another_hoards() -> None:
    async def play() -> None:
        bench = Bench(lanes=2, max_batch_size=1)
        bench.ask("a", "b", "c")
        await bench.turn()
        assert sum(len(lane.outstanding) for lane in bench.lanes) == 2
        await bench.finish(bench.lanes[1])
        assert [lane.sent[-1] for lane in bench.lanes].count(["c"]) == 1

    history(play)


def test_batches_by_cost() -> None:
    async def play() -> None:
        bench = Bench(max_batch_size=8, max_batch_cost=10.0)
        for name, cost in (("a", 4.0), ("b", 6.0), ("c", 1.0), ("d", 99.0)):
            bench.ask(name, cost=cost)
        await bench.turn()
        await bench.finish(bench.lanes[0])
        await bench.finish(bench.lanes[0])
        assert bench.lanes[0].sent == [["a", "b"], ["c"], ["d"]]

    history(play)


def test_max_wait_fills_a_batch_and_is_not_waited_when_it_is_full() -> None:
    async def play() -> None:
        bench = Bench(max_batch_size=3, max_wait_ms=60_000)
        bench.ask("a")
        await bench.turn()
        assert bench.lanes[0].sent == []
        bench.ask("b", "c")
        await bench.turn()
        assert bench.lanes[0].sent == [["a", "b", "c"]]

    async def lonely() -> None:
        bench = Bench(max_batch_size=3, max_wait_ms=5)
        bench.ask("a")
        while not bench.lanes[0].sent:
            await asyncio.sleep(0.001)

    history(play)
    history(lonely)


def test_a_client_who_left_is_never_sent() -> None:
    async def play() -> None:
        bench = Bench()
        bench.ask("a")
        bench.ask("b", gone=lambda: True)
        (cancelled,) = bench.ask("c")
        cancelled.cancel()
        bench.ask("d")
        await bench.turn()
        await bench.finish(bench.lanes[0])
        assert bench.lanes[0].sent == [["a"], ["d"]]

    history(play)


def test_a_client_who_leaves_later_is_told_to_the_worker() -> None:
    async def play() -> None:
        bench = Bench(max_batch_size=2)
        calls = bench.ask("a", "b")
        await bench.turn()
        calls[1].cancel()
        assert bench.lanes[0].cancelled == [(1, 1)]

    history(play)


def test_a_full_queue_refuses_and_makes_room_by_forgetting_the_dead() -> None:
    async def play() -> None:
        bench = Bench(lanes=0, queue_size=2)
        first, _ = bench.ask("a", "b")
        with pytest.raises(OverloadedError) as refused:
            bench.ask("c")
        assert 1 <= refused.value.retry_after_s <= 60
        first.cancel()
        bench.ask("d")
        assert bench.dispatcher.queued == 2

    history(play)


def test_a_deadline_is_a_504_and_the_model_never_sees_it() -> None:
    async def play() -> None:
        bench = Bench(lanes=0, timeout=0.01)
        (call,) = bench.ask("a")
        assert (await call.reply()).status == 504
        lane = Lane()
        bench.dispatcher.add(lane)
        await bench.turn()
        assert lane.sent == []

    history(play)


def test_a_dead_workers_requests_are_tried_once_more_each_alone() -> None:
    async def play() -> None:
        bench = Bench(lanes=2, max_batch_size=4)
        bench.lanes[1].accepts = False
        calls = bench.ask(*"abcdefgh")
        await bench.turn()
        first, second = bench.lanes
        assert first.sent == [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
        bench.dispatcher.lost(first)
        second.accepts = True
        await bench.turn()
        for _ in range(5):
            await bench.finish(second)
        assert second.sent == [["a"], ["b"], ["c"], ["d"], ["e", "f", "g", "h"]]
        assert [(await call.reply()).status for call in calls] == [200] * 8

    history(play)


def test_a_request_in_two_deaths_is_answered_and_not_tried_again() -> None:
    async def play() -> None:
        bench = Bench(lanes=2)
        (call,) = bench.ask("poison")
        await bench.turn()
        for _ in range(2):
            busy = next(lane for lane in bench.lanes if lane.outstanding)
            bench.dispatcher.lost(busy)
            await bench.turn()
        reply = await call.reply()
        assert (reply.status, reply.code) == (500, "worker_died")

    history(play)


def test_a_stream_waits_for_a_slow_reader_and_goes_on() -> None:
    async def play() -> None:
        bench = Bench()
        (call,) = bench.ask("a")
        await bench.turn()
        (lane,) = bench.lanes
        for number in range(100):
            bench.dispatcher.streamed(lane, 1, 0, b"%d" % number, OK if number == 0 else None)
        assert lane.paused
        bench.dispatcher.closed(lane, 1, 0, None)
        bench.dispatcher.done(lane, 1, 0.1)
        assert (await call.reply()).status == 200
        assert call.chunks is not None
        assert [part async for part in call.chunks] == [b"%d" % number for number in range(100)]
        assert not lane.paused

    history(play)


def test_after_the_end_everybody_is_told() -> None:
    async def play() -> None:
        bench = Bench(lanes=0)
        (waiting,) = bench.ask("a")
        bench.dispatcher.fail_all(Reply(503, "x"))
        (late,) = bench.ask("b")
        assert [(await call.reply()).status for call in (waiting, late)] == [503, 503]

    history(play)


def test_what_a_worker_dies_with_after_the_end_is_answered_too() -> None:
    async def play() -> None:
        bench = Bench()
        (call,) = bench.ask("a")
        await bench.turn()
        bench.dispatcher.fail_all(Reply(503, "x"))
        bench.dispatcher.lost(bench.lanes[0])
        assert (await call.reply()).status == 503

    history(play)


def test_a_cost_that_only_workers_know_does_not_split_batches() -> None:
    async def play() -> None:
        bench = Bench(max_batch_size=8, max_batch_cost=0.5)
        for name in "abc":
            bench.dispatcher.submit(Request(id=name), lambda: False)
        await bench.turn()
        assert bench.lanes[0].sent == [["a", "b", "c"]]

    history(play)


def test_a_request_nobody_waits_for_keeps_no_body() -> None:
    async def play() -> None:
        bench = Bench(lanes=0)
        call = bench.dispatcher.submit(Request(body=b"large"), lambda: False)
        call.cancel()
        assert call.request.body == b""

    history(play)
