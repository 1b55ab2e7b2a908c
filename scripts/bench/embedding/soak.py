"""Memory over many texts, each of them new: does it stay, and is what comes back still right?

Single texts on 48 connections and 32-text requests on 4 at once. One request in 50 has texts whose reference is known.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from serving_client import Client

from embedding import online, processes
from embedding.online import Window
from embedding.systems import Running
from embedding.texts import Text, endless

SINGLE, MANY, MANY_TEXTS, KNOWN_EVERY = 48, 4, 32, 50
_SAMPLES = 100
_SHOWN_EVERY = 5
_WARM = 0.1  # of the texts: caches and pools grow to their size
_MIB = 1 << 20


@dataclass
class Soak:
    """One soak while it runs."""

    running: Running
    vocabulary: tuple[str, ...]
    texts: Sequence[Text]
    total: int
    embedded: int = 0
    known: Window = field(default_factory=Window)
    samples: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fresh = endless(self.vocabulary, seed=2)
        self._numbers, self._known = itertools.count(), itertools.count()

    def _next(self, count: int) -> tuple[list[str], range | None]:
        if next(self._numbers) % KNOWN_EVERY:
            return [next(self._fresh).text for _ in range(count)], None
        first = next(self._known) * MANY_TEXTS
        asked = range(first, first + count)
        return [self.texts[index % len(self.texts)].text for index in asked], asked

    async def ask_on(self, client: Client, count: int) -> None:
        """One connection, until all texts are embedded."""
        while self.embedded < self.total:
            strings, asked = self._next(count)
            answer = await client.ask(online.request(strings))
            if asked is not None or answer.status != 200:
                online.take(answer, asked or range(0), self.known)
            if answer.status != 200:
                continue
            self.embedded += count
            self._sample()

    def _sample(self) -> None:
        if self.samples and self.embedded < self.samples[-1][0] + self.total / _SAMPLES:
            return
        by_role = {role: size / _MIB for role, size in processes.rss(self.running.pids).items()}
        self.samples.append((self.embedded, sum(by_role.values()), by_role))
        if len(self.samples) % _SHOWN_EVERY == 0:
            print(f"soak       mdeploy      {self.embedded} texts, {sum(by_role.values()):.0f} MiB", flush=True)


def soak(running: Running, vocabulary: tuple[str, ...], texts: Sequence[Text], total: int, reference: Any) -> Any:
    """MiB of resident memory of all processes, and MiB that 100,000 texts add."""
    state, begun = Soak(running, vocabulary, texts, total), time.monotonic()
    asyncio.run(_run(state))
    settled = [sample for sample in state.samples if sample[0] >= _WARM * total]
    return {
        "texts": state.embedded,
        "texts_s": round(state.embedded / (time.monotonic() - begun), 1),
        "mib_settled": round(settled[0][1], 1),
        "mib_peak": round(max(size for _, size, _ in state.samples), 1),
        "mib_end": round(settled[-1][1], 1),
        "mib_end_by_role": {role: round(size, 1) for role, size in settled[-1][2].items()},
        "mib_per_100k": _slope([(count, size) for count, size, _ in settled]),
        "mib_curve": [[count, round(size)] for count, size, _ in state.samples[::_SHOWN_EVERY]],
        "cosine_min": online.cosine_min(state.known, reference),
        "checked": sum(len(one.asked) for one in state.known.answers),
        "failed": dict(state.known.failed),
    }


async def _run(state: Soak) -> None:
    client = Client(state.running.url, state.running.headers)
    await asyncio.gather(*(state.ask_on(client, count) for count in _counts()))
    client.close()


def _counts() -> Iterator[int]:
    yield from itertools.repeat(1, SINGLE)
    yield from itertools.repeat(MANY_TEXTS, MANY)


def _slope(points: list[tuple[int, float]]) -> float | None:
    """Least squares, per 100,000 texts."""
    if len(points) < 3:
        return None
    counts, sizes = zip(*points, strict=True)
    return round(float(np.polyfit(np.array(counts) / 100_000, np.array(sizes), 1)[0]), 2)
