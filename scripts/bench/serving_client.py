"""An HTTP client that loads one server from one core: keep-alive connections, one request at a time on each.

Times of an open loop start when a request was due, not when the client got round to it, so a server that stalls
cannot hide the requests that it held up.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


@dataclass
class Answer:
    """One answer, and the seconds from the request's first byte to the answer's last."""

    status: int
    body: bytes
    seconds: float
    retry_after_s: float = 0.0


class Connection(asyncio.Protocol):
    """One connection. Raises ConnectionError where the server ends it before an answer is whole."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[Answer] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._retry_after = 0.0
        self._sent = 0.0
        self.lost = False

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port)
        return connection

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = float(value)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        answer = Answer(
            self._parser.get_status_code(), b"".join(self._body), time.perf_counter() - self._sent, self._retry_after
        )
        self.lost = self.lost or not self._parser.should_keep_alive()
        self._body, self._retry_after = [], 0.0
        self._parser = httptools.HttpResponseParser(self)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(answer)

    async def ask(self, request: bytes) -> Answer:
        """Send one request and wait for its answer."""
        self._waiter = asyncio.get_running_loop().create_future()
        self._sent = time.perf_counter()
        self._transport.write(request)
        return await self._waiter

    def close(self) -> None:
        """Drop it, whatever is under way."""
        self._transport.abort()


@dataclass
class Client:
    """Requests to one address; idle connections are used again."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    idle: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
        self._head = "\r\n".join([*lines, *(f"{k}: {v}" for k, v in self.headers.items()), ""]).encode()

    def request(self, body: bytes) -> bytes:
        """The request's bytes."""
        return self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def connection(self) -> Connection:
        """An idle one, or a new one."""
        while self.idle:
            found = self.idle.pop()
            if not found.lost:
                return found
        return await Connection.open(self.host, self.port)

    async def ask(self, body: bytes) -> Answer:
        """One request. Raises OSError."""
        connection = await self.connection()
        try:
            answer = await connection.ask(self.request(body))
        except BaseException:
            connection.close()
            raise
        self.idle.append(connection)
        return answer

    def close(self) -> None:
        """Drop all connections."""
        for connection in self.idle:
            connection.close()


async def open_loop(client: Client, rps: float, seconds: float, seed: int = 1) -> dict[str, Any]:
    """Independent arrivals (Poisson) at a rate; milliseconds from when each was due to its last byte."""
    chance, late_ms, latencies, failed = random.Random(seed), list[float](), list[float](), Counter[str]()

    async def one(due: float) -> None:
        try:
            answer = await asyncio.wait_for(client.ask(b'{"n": 1}'), 30)
        except (OSError, asyncio.TimeoutError) as error:
            failed[type(error).__name__] += 1
            return
        latencies.append((time.perf_counter() - due) * 1000)
        if answer.status != 200:
            failed[str(answer.status)] += 1

    begun, tasks, due = time.perf_counter(), set[asyncio.Task[None]](), 0.0
    while due < seconds:
        due += chance.expovariate(rps)
        await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
        late_ms.append((time.perf_counter() - begun - due) * 1000)
        task = asyncio.create_task(one(begun + due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    figures = {f"p{q}_ms": _quantile(latencies, q) for q in (50, 99)}
    return {**figures, "sent_late_p99_ms": _quantile(late_ms, 99), "requests": len(latencies), "failed": dict(failed)}


def _quantile(values: list[float], percent: int) -> float | None:
    return round(sorted(values)[int(len(values) * percent / 100)], 1) if values else None


@dataclass
class Tally:
    """What closed-loop clients saw: right answers, wrong ones, failures by status or exception."""

    right: int = 0
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)


async def unique_echoes(client: Client, clients: int, tally: Tally, stop: Callable[[], bool]) -> None:
    """Clients that ask for their own numbers and compare, until `stop`."""
    numbers = iter(range(1, 1 << 62))

    async def one() -> None:
        while not stop():
            number = next(numbers)
            try:
                answer = await asyncio.wait_for(client.ask(json.dumps({"n": number}).encode()), 15)
            except (OSError, asyncio.TimeoutError) as error:
                tally.failed[type(error).__name__] += 1
                await asyncio.sleep(0.05)
                continue
            if answer.status != 200:
                tally.failed[str(answer.status)] += 1
            elif json.loads(answer.body) == {"n": number}:
                tally.right += 1
            else:
                tally.wrong += 1

    await asyncio.gather(*(one() for _ in range(clients)))


@dataclass
class Flood:
    """What clients of an overloaded server saw: seconds until each was shed, when each answer came."""

    shed_s: list[float] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)


async def flood(client: Client, clients: int, seconds: float) -> Flood:
    """Clients that all ask at once, and again after Retry-After where they were shed; then all go away."""
    seen, chance = Flood(), random.Random(1)
    connections = [await client.connection() for _ in range(clients)]
    request, end = client.request(b'{"n": 1}'), time.perf_counter() + seconds

    async def one(connection: Connection) -> None:
        while time.perf_counter() < end:
            if connection.lost:
                connection = await client.connection()
                connections.append(connection)
            answer = await connection.ask(request)
            if answer.status == 200:
                seen.answered_at.append(time.perf_counter())
            elif answer.status in (429, 503):
                seen.shed_s.append(answer.seconds)
                await asyncio.sleep(max(1.0, answer.retry_after_s) + chance.random())
            else:
                seen.other[str(answer.status)] += 1

    tasks = [asyncio.create_task(one(connection)) for connection in connections]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, OSError):
            seen.other[type(outcome).__name__] += 1
    for connection in connections:
        connection.close()
    return seen
