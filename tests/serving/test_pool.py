"""Real worker processes of one handler: started, killed, stopped, hung, replaced. No HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mdeploy.serving.handler import Request
from mdeploy.serving.info import Reply
from mdeploy.serving.pool import Pool, PoolOptions
from mdeploy.serving.process import StartError, list_handlers
from tests.support import processes_with

APP = """
import os, sys, time
from pathlib import Path
from mdeploy import Handler

class Echo(Handler):
    workers_per_device = 2
    timeout = 20
    def init(self, device):
        self.device = device
    def inference(self, request):
        order = request.json()
        if order == "die":
            os._exit(3)
        if order == "where":
            names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MDEPLOY_API_KEYS_FILE")
            return {"device": self.device, **{name: os.environ.get(name) for name in names}}
        return {"pid": os.getpid(), "order": order}

class Hangs(Handler):
    timeout = 1
    def inference(self, request):
        if request.json() == "hang":
            time.sleep(600)
        return os.getpid()

class Forks(Handler):
    def init(self, device):
        if os.fork() == 0:
            time.sleep(600)
    def inference(self, request):
        return 1

class Second(Handler):
    \"\"\"Starts once; a file beside it says when it may not start again.\"\"\"
    def init(self, device):
        if Path(__file__).with_name("broken").exists():
            raise RuntimeError("broken by now")
        if Path(__file__).with_name("stuck").exists():
            time.sleep(600)
    def inference(self, request):
        return os.getpid()

class Measures(Handler):
    def init(self, device):
        self.max_batch_cost = float(Path(__file__).with_name(os.environ["CUDA_VISIBLE_DEVICES"]).read_text())
    def forward(self, batch):
        return batch
"""


class Observer:
    def __init__(self) -> None:
        self.restarts: list[str] = []

    def batch(self, handler: str, size: int, seconds: float) -> None:
        assert size > 0

    def waited(self, handler: str, seconds: float) -> None:
        assert seconds >= 0

    def restarted(self, handler: str, reason: str) -> None:
        self.restarts.append(reason)


class Running:
    """A pool that has started."""

    def __init__(self, app: Path, name: str, **options: Any) -> None:
        self.observer = Observer()
        self.said: list[str] = []
        self.pool = Pool(PoolOptions(f"{app}:{name}", sys.executable, **options), self.observer, self.said.append)

    async def __aenter__(self) -> Running:
        await self.pool.start()
        return self

    async def __aexit__(self, *why: object) -> None:
        pids = self.pids
        await self.pool.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pool.workers()]

    async def ask(self, *orders: Any) -> list[Reply]:
        calls = [self.pool.submit(Request(body=json.dumps(order).encode()), lambda: False) for order in orders]
        return [await call.reply() for call in calls]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(APP)
    return path


def play(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


def test_batches_suit_the_smallest_worker_whichever_was_renewed_last(app: Path) -> None:
    def measure(**costs: int) -> None:
        for device, cost in costs.items():
            app.with_name(device).write_text(str(cost))

    async def story() -> None:
        measure(gpu0=30, gpu1=70)
        async with Running(app, "Measures", devices=("gpu0", "gpu1")) as running:
            pool = running.pool
            assert pool.info.max_batch_cost == 30
            await pool.renew()
            assert pool.info.max_batch_cost == 30
            measure(gpu1=20)
            os.kill(pool.workers()[1].pid, signal.SIGKILL)
            await running.until(lambda: pool.info.max_batch_cost == 20)

    play(story)


def body(reply: Reply) -> Any:
    assert reply.status == 200, reply
    return json.loads(bytes(reply.body))


def test_every_slot_has_a_worker_of_its_own(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDEPLOY_API_KEYS_FILE", "/secret")

    async def story() -> None:
        async with Running(app, "Echo", devices=("3",), threads=5) as running:
            assert len(set(running.pids)) == 2
            answers = [body(reply) for reply in await running.ask(*range(50))]
            assert [answer["order"] for answer in answers] == list(range(50))
            assert {answer["pid"] for answer in answers} == set(running.pids)
            (where,) = await running.ask("where")
            assert body(where) == {
                "device": "cuda:0",
                "CUDA_VISIBLE_DEVICES": "3",
                "OMP_NUM_THREADS": "5",
                "MDEPLOY_API_KEYS_FILE": None,
            }

    play(story)


def test_a_large_payload_comes_back_as_it_was(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            text = "x" * 3_000_000
            (reply,) = await running.ask(text)
            assert body(reply)["order"] == text

    play(story)


def test_one_that_kills_its_workers_is_answered_and_nobody_else_suffers(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            replies = await running.ask(*range(8), "die", *range(8))
            assert [reply.status for reply in replies] == [200] * 8 + [500] + [200] * 8
            assert replies[8].code == "worker_died"
            await running.until(lambda: len([w for w in running.pool.workers() if w.state == "ready"]) == 2)
            assert running.observer.restarts == ["crash", "crash"]
            assert "ended with status 3" in running.said[0]

    play(story)


def test_a_killed_worker_loses_nothing(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            for _ in range(5):
                await running.until(lambda: all(worker.state == "ready" for worker in running.pool.workers()))
                asking = asyncio.ensure_future(running.ask(*range(200)))
                await asyncio.sleep(0)
                os.kill(running.pids[0], signal.SIGKILL)
                assert [body(reply)["order"] for reply in await asking] == list(range(200))

    play(story)


def test_a_hung_worker_is_replaced_at_its_deadline(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Hangs") as running:
            before = running.pids
            (reply,) = await running.ask("hang")
            assert (reply.status, reply.code) == (504, "timeout")
            await running.until(lambda: running.observer.restarts == ["hang"])
            await running.until(lambda: running.pool.workers()[0].state == "ready")
            assert body((await running.ask("hello"))[0]) not in before

    play(story)


def test_a_stopped_worker_is_replaced_and_its_requests_are_answered(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            for pid in running.pids:
                os.kill(pid, signal.SIGSTOP)
            assert [body(reply)["order"] for reply in await running.ask(1, 2, 3)] == [1, 2, 3]
            assert running.observer.restarts == ["hang", "hang"]

    play(story)


def test_what_a_worker_forked_ends_with_it(app: Path) -> None:
    def in_session(pid: int) -> list[str]:
        stats = (entry / "stat" for entry in Path("/proc").iterdir() if entry.name.isdigit())
        texts = [stat.read_text() for stat in stats if stat.exists()]
        return [text for text in texts if text.rpartition(")")[2].split()[3] == str(pid)]

    async def story() -> None:
        async with Running(app, "Forks") as running:
            (pid,) = running.pids
            assert len(in_session(pid)) == 2
            os.kill(pid, signal.SIGKILL)
            await running.until(lambda: running.pids != [pid])
            await running.until(lambda: not in_session(pid))
            (last,) = running.pids
        await running.until(lambda: not in_session(last))

    play(story)


def test_renewing_replaces_all_and_loses_nothing(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Echo") as running:
            before, asked, renewing = set(running.pids), 0, asyncio.ensure_future(running.pool.renew())
            while not renewing.done():
                assert [body(reply)["order"] for reply in await running.ask(*range(20))] == list(range(20))
                asked += 1
            await renewing
            assert asked > 0
            await running.until(lambda: len(running.pids) == 2)
            assert not before & set(running.pids)
            assert {worker.generation for worker in running.pool.workers()} == {2}

    play(story)


def test_a_fresh_worker_that_does_not_start_leaves_the_old_one(app: Path) -> None:
    async def story() -> None:
        async with Running(app, "Second") as running:
            before = running.pids
            app.with_name("broken").touch()
            with pytest.raises(StartError, match="RuntimeError: broken by now"):
                await running.pool.renew()
            assert running.pids == before
            assert body((await running.ask(1))[0]) == before[0]

    play(story)


def test_a_fresh_worker_that_never_gets_ready_leaves_the_old_one(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdeploy.serving.pool._START_S", 3.0)
    monkeypatch.setattr("mdeploy.serving.pool._START_FACTOR", 1.0)

    async def story() -> None:
        async with Running(app, "Second") as running:
            before = running.pids
            app.with_name("stuck").touch()
            with pytest.raises(StartError, match="not ready after"):
                await running.pool.renew()
            assert running.pids == before

    play(story)


def test_one_that_never_starts_again_is_given_up(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdeploy.serving.pool._BACK_OFF_S", (0.01, 0.02))

    async def story() -> None:
        async with Running(app, "Second") as running:
            app.with_name("broken").touch()
            os.kill(running.pids[0], signal.SIGKILL)
            assert "broken by now" in await running.pool.broken
            assert running.observer.restarts == ["crash"] + ["startup"] * 5

    play(story)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("import importlib; importlib.import_module('nor_this')", "line 2)"),
        ("class A(:", "SyntaxError"),
        ("class A: pass", "A is no Handler"),
        ("import os; os._exit(7)", "it ended with status 7 before it was ready"),
        ("raise SystemExit('no GPU here')", "no GPU here"),
    ],
)
def test_why_a_class_does_not_start(app: Path, source: str, text: str) -> None:
    app.write_text(f"from mdeploy import Handler\n{source}\n")

    async def story() -> None:
        running = Running(app, "A")
        with pytest.raises(StartError) as error:
            await running.pool.start()
        assert text in str(error.value)
        assert all(not Path(f"/proc/{pid}").exists() for pid in running.pids)

    play(story)


def test_an_interpreter_that_is_none(app: Path) -> None:
    async def story() -> None:
        pool = Pool(PoolOptions(f"{app}:Echo", "/no/such/python"), Observer(), print)
        with pytest.raises(StartError, match="cannot run /no/such/python"):
            await pool.start()

    play(story)


def test_handlers_are_listed_by_the_interpreter_that_runs_them(app: Path) -> None:
    app.write_text(f"import os\nprint('noise')\nos.system('echo noise')\n{APP}")
    specs = asyncio.run(list_handlers(sys.executable, str(app), (), os.environ))
    assert [spec.rpartition(":")[2] for spec in specs] == ["Echo", "Hangs", "Forks", "Second", "Measures"]
    app.write_text("x = 1")
    with pytest.raises(StartError, match="defines no Handler"):
        asyncio.run(list_handlers(sys.executable, str(app), (), os.environ))


def _marked(app: Path) -> dict[str, str]:
    """An environment by which processes are found."""
    return {**os.environ, "MARK": str(app)}


@pytest.mark.parametrize(
    "left", ["subprocess.Popen(['sleep', '600'])", "threading.Thread(target=time.sleep, args=(600,)).start()"]
)
def test_what_an_import_leaves_running_does_not_hold_up_the_list(app: Path, left: str) -> None:
    app.write_text(f"import subprocess, threading\n{APP}\n{left}\n")
    specs = asyncio.run(asyncio.wait_for(list_handlers(sys.executable, str(app), (), _marked(app)), 60))
    assert len(specs) == 5
    assert not processes_with(f"MARK={app}")


def test_an_import_without_end_ends_when_nobody_waits_any_more(app: Path) -> None:
    app.write_text("from pathlib import Path\nPath(__file__).with_name('begun').touch()\nwhile True: pass\n")

    async def story() -> None:
        listing = asyncio.create_task(list_handlers(sys.executable, str(app), (), _marked(app)))
        while not app.with_name("begun").exists():
            await asyncio.sleep(0.01)
        listing.cancel()
        await asyncio.wait({listing})
        assert listing.cancelled()
        assert not processes_with(f"MARK={app}")

    play(story)
