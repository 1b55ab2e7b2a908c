"""What must not wedge a pool: a full disk, no descriptors, words nobody can read, readers who leave, bad moments."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mdeploy.serving.backend import StreamError
from mdeploy.serving.calls import Call
from mdeploy.serving.handler import Request
from mdeploy.serving.pool import Pool, PoolOptions
from mdeploy.serving.process import WorkerProcess
from tests.serving.test_pool import Observer, Running, body, play

APP = """
import threading, time
from pathlib import Path
from mdeploy import Handler, HTTPError

class Refused(Exception):
    pass

class Echo(Handler):
    timeout = 20
    errors = {Refused: 409}
    def inference(self, request):
        order = request.json()
        if order == "refuse":
            raise HTTPError(400, Refused("a class of mine"), code=7)
        if order == "view":
            return memoryview(bytes(range(256)) * 1000)[::2]
        time.sleep(order if isinstance(order, float) else 0)
        return order

class Streams(Handler):
    timeout = 2
    streamed_as = "raw"
    def inference(self, request):
        for _ in range(request.json()):
            yield b"x" * 1000

class Breaks(Handler):
    # one item ruins the GPU for all that come after it
    max_batch_size = 8
    ruined = False
    def forward(self, batch):
        self.ruined = self.ruined or "assert" in batch
        if self.ruined:
            raise RuntimeError("CUDA error: device-side assert triggered\\nKernel errors may be told late")
        return batch

class Lazy(Handler):
    def forward(self, batch):
        class Later(list):
            def __iter__(self):
                raise RuntimeError("it failed late")
        return Later(batch)

class Lingers(Handler):
    timeout = 20
    def init(self, device):
        threading.Thread(target=time.sleep, args=(600,)).start()
        if Path(__file__).with_name("broken").exists():
            raise RuntimeError("broken by now")
    def inference(self, request):
        raise SystemExit

class Untidy(Handler):
    def forward(self, batch):
        try:
            while True:
                yield batch
        finally:
            raise RuntimeError("nothing was tidied")
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(APP)
    return path


@contextmanager
def open_files(at_most: int | None = None, *, also: int = 0) -> Iterator[None]:
    """Hold so many descriptors more, or all there are below a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (at_most or min(hard, soft + also), hard))
    held: list[int] = []
    try:
        while at_most or len(held) < also:
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def first(running: Running) -> WorkerProcess:
    return running.pool._slots[0].worker


def stream(running: Running, parts: int) -> Call:
    return running.pool.submit(Request(body=b"%d" % parts), lambda: False)


def test_a_worker_that_starts_among_thousands_of_connections_works(app: Path) -> None:
    async def story() -> None:
        with open_files(also=1100):  # its socket has a number above what select() takes
            async with Running(app, "Echo") as running:
                assert [body(reply) for reply in await running.ask("a", "b")] == ["a", "b"]

    play(story)


def test_without_descriptors_the_large_are_refused_and_the_small_go_on(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            with open_files(max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) + 1):
                large, small = await running.ask("x" * 100_000, "small")
            assert (large.status, large.code) == (503, "overloaded")
            assert body(small) == "small"
            assert body((await running.ask("x" * 100_000))[0]) == "x" * 100_000

    play(story)


@pytest.mark.parametrize(
    ("name", "order", "status", "code"),
    [("Echo", "refuse", 400, "7"), ("Echo", "view", 200, ""), ("Lazy", "x", 500, "internal_error")],
)
def test_what_a_class_returns_or_raises_costs_no_worker(
    app: Path, name: str, order: str, status: int, code: str
) -> None:
    async def story() -> None:
        async with Running(app, name) as running:
            before = running.pids
            (reply,) = await running.ask(order)
            assert (reply.status, reply.code) == (status, code)
            assert running.pids == before
            assert order != "view" or bytes(reply.body) == bytes(range(0, 256, 2)) * 1000

    play(story)


def test_a_generator_that_fails_at_its_end_costs_no_worker(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Untidy") as running:
            before = running.pids
            for _ in range(2):
                call = stream(running, 1)
                assert (await call.reply()).status == 200
                call.cancel()
                await running.until(lambda: running.pool.in_flight == 0)
            assert running.pids == before

    play(story)


def test_a_ruined_gpu_costs_only_the_request_that_ruins_it(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Breaks") as running:
            replies = await running.ask(1, 2, "assert", 3)
            assert [reply.status for reply in replies] == [200, 200, 500, 200]
            assert body((await running.ask(4))[0]) == 4

    play(story)


def test_a_slow_reader_who_leaves_holds_nobody_up(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Streams") as running:
            slow = stream(running, 1_000_000)
            await slow.reply()
            await running.until(lambda: first(running)._paused_at is not None)
            slow.cancel()
            assert (await stream(running, 1).reply()).status == 200
            assert slow.chunks is not None
            assert len([part async for part in slow.chunks]) < 1000

    play(story)


def test_a_stream_that_is_read_too_slowly_does_not_look_whole(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Streams") as running:
            slow = stream(running, 1_000_000)
            await slow.reply()
            await running.until(lambda: running.pool.in_flight == 0)
            assert slow.chunks is not None
            with pytest.raises(StreamError, match="too slowly"):
                [part async for part in slow.chunks]

    play(story)


def test_a_fresh_worker_that_dies_while_the_old_one_retires_is_replaced_at_once(
    app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdeploy.serving.pool._END_S", 0.1)

    async def story() -> None:
        async with Running(app, "Echo") as running:
            busy = asyncio.ensure_future(running.ask(8.0))
            await running.until(lambda: running.pool.in_flight == 1)
            renewing = asyncio.ensure_future(running.pool.renew())
            await running.until(lambda: first(running).generation == 2)
            os.kill(first(running).pid, signal.SIGSTOP)
            asking = asyncio.ensure_future(running.ask("hello"))
            await running.until(lambda: bool(first(running).outstanding))
            os.kill(first(running).pid, signal.SIGKILL)
            assert body((await asking)[0]) == "hello"
            assert not busy.done()
            assert running.observer.restarts == ["rolling", "crash"]
            renewing.cancel()

    play(story)


def test_an_interpreter_that_is_away_for_a_while_costs_no_slot(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdeploy.serving.pool._BACK_OFF_S", (0.05, 0.05))
    python, away = app.with_name("python"), app.with_name("away")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    async def story() -> None:
        observer, said = Observer(), list[str]()
        pool = Pool(PoolOptions(f"{app}:Echo", str(python), devices=("cpu", "cpu")), observer, said.append)
        await pool.start()
        old = pool.workers()[0].pid
        python.rename(away)
        os.kill(old, signal.SIGKILL)
        while "cannot run" not in "".join(said):
            await asyncio.sleep(0.01)
        away.rename(python)
        while len([worker for worker in pool.workers() if worker.state == "ready"]) < 2:
            await asyncio.sleep(0.01)
        assert old not in [worker.pid for worker in pool.workers()]
        await pool.close()

    play(story)


def test_a_start_that_is_called_off_as_its_worker_speaks_ends(app: Path) -> None:
    async def story() -> None:
        pool = Pool(PoolOptions(f"{app}:Echo", sys.executable), Observer(), print)
        starting = asyncio.ensure_future(pool.start())
        await asyncio.sleep(0)
        sock = pool._slots[0].worker._sock
        asyncio.get_running_loop().remove_reader(sock.fileno())
        while not _has_words(sock):
            time.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert pool._slots[0].worker.gone.done()

    play(story)


def _has_words(sock: Any) -> bool:
    try:
        return bool(sock.recv(1, 0x2))  # MSG_PEEK
    except BlockingIOError:
        return False


def test_a_worker_whose_threads_do_not_end_is_ended(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdeploy.serving.process._LAST_S", 0.1)
    monkeypatch.setattr("mdeploy.serving.pool._BACK_OFF_S", (0.01, 0.02))

    async def story() -> None:
        async with Running(app, "Lingers") as running:
            (reply,) = await running.ask("x")
            assert (reply.status, reply.code) == (500, "worker_died")
            await running.until(lambda: running.pool.workers()[0].state == "ready")
            app.with_name("broken").touch()
            os.kill(running.pids[0], signal.SIGKILL)
            assert "broken by now" in await running.pool.broken

    play(story)


def test_words_nobody_can_read_end_the_worker_and_its_request_is_tried_elsewhere(app: Path) -> None:
    app.write_text(
        "import gc\nfrom mdeploy import Handler\nfrom mdeploy.serving.worker import _Loop\n"
        "class A(Handler):\n    def inference(self, request):\n"
        "        (loop,) = [each for each in gc.get_objects() if isinstance(each, _Loop)]\n"
        "        loop._sock.send(b'\\0no pickle')\n        __import__('time').sleep(600)\n"
    )

    async def story() -> None:
        async with Running(app, "A") as running:
            (reply,) = await running.ask("x")
            assert (reply.status, reply.code) == (500, "worker_died")
            assert "cannot be understood" in running.said[0]

    play(story)


def test_a_worker_that_is_gone_is_not_killed_again(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            worker = first(running)
            worker.end()
            await worker.gone
            with monkeypatch.context() as patch:
                patch.setattr(os, "killpg", lambda *words: pytest.fail("its number may be another's"))
                worker.kill("once more")

    play(story)
