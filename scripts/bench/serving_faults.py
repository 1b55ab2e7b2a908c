"""What a served class goes through when a worker is killed, a worker stops, or far too many ask at once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

from serving_client import Client, Tally, flood, unique_echoes
from serving_systems import Model, Running, serving

CLIENTS = 16
RECOVERY_S = 20.0
STOP_TIMEOUT_S = 3.0

Row = dict[str, Any]


def crash(name: str, kills: int) -> Row:
    """kill -9 one of two workers while at least two requests are being computed in it, again and again."""
    with serving(name, Model(base_ms=100, item_ms=0.5, max_batch=4, workers=2, tells=True)) as running:
        tally, back_s = Tally(), list[float]()

        async def faults() -> None:
            for _ in range(kills):
                seconds = await _kill_one(running)
                if seconds is None:
                    break
                back_s.append(seconds)

        asyncio.run(_under_load(running, tally, faults))
        hits = len(back_s)
    worst = {"back_s_worst": max(back_s)} if back_s else {}
    return {"kills_survived": f"{hits}/{kills}", "answered": tally.right, **_failures(tally), **worst}


def _failures(tally: Tally) -> Row:
    return {"wrong": tally.wrong, "failed": sum(tally.failed.values()), "by_error": dict(tally.failed)}


async def _under_load(running: Running, tally: Tally, faults: Callable[[], Coroutine[Any, Any, None]]) -> None:
    client, is_over = Client(running.url, running.headers), asyncio.Event()
    load = asyncio.create_task(unique_echoes(client, CLIENTS, tally, is_over.is_set))
    try:
        await faults()
        await asyncio.sleep(1)  # what the last fault broke shows itself
    finally:
        is_over.set()
        await load
        client.close()


async def _kill_one(running: Running) -> float | None:
    """Seconds until a new worker computes; None where none comes."""
    while True:
        await _until(lambda: len(running.workers()) == 2 and min(running.workers().values()) >= 2)
        before = running.workers()
        victim = next(iter(before))
        os.kill(victim, signal.SIGKILL)
        # The file says what it was doing when it died: nobody writes it any more.
        if int((running.state / str(victim)).read_text() or 0) >= 2:
            break
    return await _seconds_until(lambda: any(n > 0 for pid, n in running.workers().items() if pid not in before))


async def _until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.002)
    return True


async def _seconds_until(condition: Callable[[], bool]) -> float | None:
    """None where it takes longer than anybody would wait."""
    begun = time.monotonic()
    return round(time.monotonic() - begun, 3) if await _until(condition, RECOVERY_S) else None


def stopped(name: str) -> Row:
    """SIGSTOP one of two workers under load: seconds until it is gone and another computes in its place."""
    model = Model(base_ms=100, item_ms=0.5, max_batch=4, workers=2, tells=True, timeout_s=STOP_TIMEOUT_S)
    with serving(name, model) as running:
        tally, row = Tally(), Row()

        async def faults() -> None:
            await _until(lambda: len(running.workers()) == 2 and min(running.workers().values()) >= 2)
            before = running.workers()
            victim = next(iter(before))
            os.kill(victim, signal.SIGSTOP)

            def is_replaced() -> bool:
                now = running.workers()
                return victim not in now and any(n > 0 for pid, n in now.items() if pid not in before)

            row["replaced_s"] = await _seconds_until(is_replaced)

        asyncio.run(_under_load(running, tally, faults))
    return {"deadline_s": STOP_TIMEOUT_S, **row, "answered": tally.right, **_failures(tally)}


def overload(name: str, clients: int, seconds: float) -> Row:
    """Clients far beyond what one worker of 38.5 ms can answer."""
    model = Model(base_ms=38.5)
    with serving(name, model) as running:
        asyncio.run(unique_echoes_for(running, 2.0))
        memory = running.memory()
        client = Client(running.url, running.headers)
        begun = time.perf_counter()
        seen = asyncio.run(flood(client, clients, seconds))
        healthy_s = asyncio.run(_seconds_until(running.answers))
        time.sleep(3)  # for buffers and closed connections to be let go
        left = running.memory()
    shed = sorted(seen.shed_s)
    answered = [at for at in seen.answered_at if at - begun > 1]
    rate = len(answered) / (max(answered) - begun - 1) if answered else 0.0
    return {
        "clients": clients,
        "shed": len(shed),
        "shed_p50_s": round(shed[len(shed) // 2], 3) if shed else None,
        "shed_worst_s": round(shed[-1], 3) if shed else None,
        "goodput_share": round(rate / model.ideal_rps, 3),
        "other": dict(seen.other),
        "healthy_after_s": healthy_s,
        "memory_ratio": round(left / memory, 2) if memory else None,
    }


async def unique_echoes_for(running: Running, seconds: float) -> Tally:
    """A little load, to warm up."""
    tally, end = Tally(), time.monotonic() + seconds
    client = Client(running.url, running.headers)
    await unique_echoes(client, 4, tally, lambda: time.monotonic() > end)
    client.close()
    return tally
