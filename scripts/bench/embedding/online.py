"""One load on one service: closed loops over keep-alive connections, from the client's core.

What an answer holds is looked at when the load is over, so that it costs the client nothing while it measures.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from serving_client import Answer, Client

from embedding import offline, processes
from embedding.systems import MODEL_NAME, Running
from embedding.texts import Text

BUSY = 0.85  # a client that has more of its core than this may be what was measured
_WARM_S = 1.0
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Answered:
    """Texts that were answered: which, the answer's bytes, when the request was sent and when all of it was there."""

    asked: range
    body: bytes
    sent: float
    done: float

    def within(self, begin: float, end: float) -> float:
        """The share of its time that lies in between."""
        return max(0.0, min(self.done, end) - max(self.sent, begin)) / (self.done - self.sent)


@dataclass
class Window:
    """What came back, and when those requests were sent that are under way."""

    answers: list[Answered] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    under_way: dict[int, float] = field(default_factory=dict)
    closed: bool = False


@dataclass(frozen=True)
class Load:
    """So many connections, so many texts a request; texts are taken in turn, beginning with `first`."""

    connections: int
    texts: int
    seconds: float
    first: int = 0


def measure(running: Running, load: Load, texts: Sequence[Text], reference: Any) -> dict[str, Any]:
    """Speed, latency, what it cost whom, and how near each vector was to its reference.

    A request that was under way when the window was opened or closed counts by the share of its time in it: requests
    are answered in bunches, and whether a bunch falls just in or out would be 5 % of a short window.
    """
    window, begin, end, used = asyncio.run(_loaded(running, load, texts))
    wall, shares = end - begin, [answer.within(begin, end) for answer in window.answers]
    embedded = sum(share * len(answer.asked) for share, answer in zip(shares, window.answers, strict=True))
    tokens = sum(
        share * texts[index % len(texts)].tokens
        for share, answer in zip(shares, window.answers, strict=True)
        for index in answer.asked
    )
    done = [one for one in window.answers if begin <= one.done < end] or window.answers
    latencies = sorted((one.done - one.sent) * 1000 for one in done)
    return {
        "texts_s": round(embedded / wall, 2),
        "tokens_s": round(tokens / wall, 1),
        "tokens_cpu_s": round(tokens / max(0.01, sum(used.roles.values())), 1),
        "p50_ms": _quantile(latencies, 50),
        "p99_ms": _quantile(latencies, 99),
        "cosine_min": cosine_min(window, reference),
        "cpu_ms": {role: round(s / max(1, embedded) * 1000, 3) for role, s in sorted(used.roles.items())},
        "client_core": round(used.client / wall, 3),
        "client_was_the_limit": used.client / wall > BUSY,
        "foreign_core": round((used.foreign + used.stolen) / wall, 3),
        "failed": dict(window.failed),
    }


def _quantile(values: list[float], percent: int) -> float:
    return round(values[min(len(values) - 1, int(len(values) * percent / 100))], 2) if values else 0.0


def cosine_min(window: Window, reference: Any) -> float:
    """The least of all answers; -1 where one has not as many vectors as it was asked for, or none came."""
    least = 1.0 if window.answers else -1.0
    for one in window.answers:
        rows = np.array([row["embedding"] for row in orjson.loads(one.body)["data"]], np.float32)
        if len(rows) != len(one.asked):
            return -1.0
        least = min(least, offline.cosine_min(rows, reference[[index % len(reference) for index in one.asked]]))
    return least


async def _loaded(running: Running, load: Load, texts: Sequence[Text]) -> tuple[Window, float, float, processes.Spent]:
    """Load it: all answers, and from when to when the figures are taken. Not from the first second, when batches grow.

    The load goes on until whatever was under way at the end is answered, else that would be quicker than usual.
    """
    client, window = Client(running.url, running.headers), Window()
    turns = _turns(load, len(texts))
    tasks = [asyncio.create_task(_ask_on(client, turns, texts, window)) for _ in range(load.connections)]
    await _unless_failed(tasks, min(_WARM_S, load.seconds))
    before, begin = processes.spent(running.pids), time.perf_counter()
    await _unless_failed(tasks, load.seconds)
    end, used = time.perf_counter(), processes.spent(running.pids).since(before)
    while min(window.under_way.values(), default=end) < end and time.perf_counter() < end + _PATIENCE_S:
        await _unless_failed(tasks, 0.02)
    window.closed = True
    await asyncio.wait_for(asyncio.gather(*tasks), _PATIENCE_S)  # nobody else's turn begins with our requests
    client.close()
    return window, begin, end, used


async def _unless_failed(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


def _turns(load: Load, count: int) -> Iterator[range]:
    start = load.first % count
    while True:
        yield range(start, start + load.texts)
        start += load.texts


async def _ask_on(client: Client, turns: Iterator[range], texts: Sequence[Text], window: Window) -> None:
    while not window.closed:
        asked = next(turns)
        body = request([texts[index % len(texts)].text for index in asked])
        window.under_way[asked.start] = time.perf_counter()
        take(await client.ask(body), asked, window)
        del window.under_way[asked.start]


def take(answer: Answer, asked: range, window: Window) -> None:
    """Write it down."""
    if answer.status == 200:
        now = time.perf_counter()
        window.answers.append(Answered(asked, answer.body, now - answer.seconds, now))
    else:
        window.failed[str(answer.status)] += 1


def request(texts: list[str]) -> bytes:
    """A request's body, which every one of the systems understands."""
    return orjson.dumps({"model": MODEL_NAME, "input": texts})
