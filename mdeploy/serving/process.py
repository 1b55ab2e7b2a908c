"""One worker process as the edge holds it: started, spoken to, watched, ended. Nothing of it outlives the edge."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from mdeploy.endings import ending
from mdeploy.serving import answers, wire
from mdeploy.serving.calls import Batch
from mdeploy.serving.info import HandlerInfo, Reply, WorkerState
from mdeploy.serving.worker import Job

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
_MESSAGES_A_TURN = 32
_STOPPED_TICKS = 2
_LAST_S = 5.0
"""What a process gets to end once it hung up."""
_LIST_BYTES = 1 << 20


class StartError(Exception):
    """A worker did not become ready; the text is the last line of its user's traceback, or how it ended."""


class Listener(Protocol):
    """What a worker process reports to (the dispatcher)."""

    def replied(self, lane: WorkerProcess, number: int, replies: list[tuple[int, Reply]]) -> None:
        """Some requests of a batch are answered."""

    def streamed(self, lane: WorkerProcess, number: int, index: int, part: bytes, head: Reply | None) -> None:
        """One part of a stream."""

    def closed(self, lane: WorkerProcess, number: int, index: int, error: Reply | None) -> None:
        """A stream is over."""

    def done(self, lane: WorkerProcess, number: int, seconds: float) -> None:
        """A batch is through."""


class WorkerProcess:
    """A worker and our end of its socket; a lane of the dispatcher.

    `described` and `ready` are futures that fail with StartError; `gone` is done, with words for how it ended, once
    no process of it is left.
    """

    def __init__(self, job: Job, python: str, env: Mapping[str, str], generation: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.device, self.generation = job.device, generation
        self.outstanding: collections.deque[Batch] = collections.deque()
        self.accepts = False
        self.freed_at = 0.0
        self.described: asyncio.Future[HandlerInfo] = self._loop.create_future()
        self.ready: asyncio.Future[HandlerInfo] = self._loop.create_future()
        self.gone: asyncio.Future[str] = self._loop.create_future()
        self.listener: Listener | None = None
        self.killed_for = ""
        self._progress_at = self._loop.time()
        self._paused_at: float | None = None
        self._stopped_ticks = 0
        self._requests = self._gpu_bytes = 0
        self._unsent: collections.deque[tuple[bytes, int | None]] = collections.deque()
        self._sock, theirs = wire.pair()
        self._sock.setblocking(False)
        try:
            with theirs:
                self._process = self._spawn(job, python, env, theirs.fileno())
            self._pidfd = _pidfd_of(self._process)
        except OSError:
            self._sock.close()
            raise
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._loop.add_reader(self._pidfd, self._on_exit)

    def _spawn(self, job: Job, python: str, env: Mapping[str, str], fd: int) -> subprocess.Popen[bytes]:
        """A session of its own: Ctrl-C is ours, and what it forks can be ended with it. Raises OSError."""
        words = json.dumps(dataclasses.asdict(job))
        return subprocess.Popen(
            [python, str(_BOOTSTRAP), "worker", str(fd), str(os.getpid()), words],
            pass_fds=[fd],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def state(self) -> WorkerState:
        """How it is."""
        return WorkerState(self.pid, self.device, self.generation, self._word(), self._requests, self._gpu_bytes)

    def _word(self) -> Literal["starting", "ready", "busy", "stopped", "retiring"]:
        if self._stopped_ticks:
            return "stopped"
        if not self.ready.done():
            return "starting"
        return "retiring" if not self.accepts else "busy" if self.outstanding else "ready"

    # to the worker

    def send(self, batch: Batch) -> None:
        """Hand a batch over."""
        if len(self.outstanding) == 1:
            self._progress_at = self._loop.time()
        self._requests += len(batch.calls)
        self._post(("batch", batch.number, [call.request for call in batch.calls]))

    def cancel(self, batch: Batch, index: int) -> None:
        """Nobody waits for this answer any more, or reads this stream."""
        if index in batch.left:
            self._post(("cancel", batch.number, index))
        self.resume()

    def end(self) -> None:
        """It may go, once it is through with what it has."""
        self.accepts = False
        self._post(("end",))

    def kill(self, reason: str) -> None:
        """End it now, with all it forked."""
        if self.gone.done():  # its number may be another's by now
            return
        self.killed_for = self.killed_for or reason
        self.accepts = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _post(self, message: Any) -> None:
        if self.gone.done():
            return
        self._unsent.append(wire.pack(message))
        self._flush()

    def _flush(self) -> None:
        """Send what the socket takes; the rest when it can."""
        while self._unsent:
            packet, fd = self._unsent[0]
            try:
                wire.post(self._sock, packet, fd)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except wire.ClosedError:  # it is dying: _on_exit tells what becomes of its batches
                break
            except OSError as error:
                self.kill(f"nothing can be sent to it: {error.strerror}")
                break
            self._unsent.popleft()
            _close(fd)
        self._loop.remove_writer(self._sock.fileno())

    # from the worker

    def pause(self) -> None:
        """Take no more parts for now: the worker waits as soon as the socket is full."""
        if self._paused_at is None and not self.gone.done():
            self._paused_at = self._loop.time()
            self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """Go on."""
        if self._paused_at is not None and not self.gone.done():
            self._paused_at = None
            self._progress_at = self._loop.time()
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        try:
            for _ in range(_MESSAGES_A_TURN):
                self._on_message(wire.receive(self._sock))
                if self._paused_at is not None:
                    return
        except BlockingIOError:
            return
        except wire.ClosedError:  # a process outlives this where a thread of the user's does not end
            self.accepts = False
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(_LAST_S, self.kill, "it hung up and did not end")
        except Exception as error:  # whatever it is, an answer is lost with it
            self._garbled(error)

    def _garbled(self, error: Exception) -> None:
        """Rather no worker than one whose words are lost: its requests would wait for ever."""
        self.kill(f"it said what cannot be understood: {error!r}")

    def _on_message(self, message: Any) -> None:
        kind, *rest = message
        if kind in ("info", "ready", "failed"):
            self._on_start(kind, rest)
            return
        self._progress_at = self._loop.time()
        assert self.listener is not None
        if kind == "replies":
            self.listener.replied(self, *rest)
        elif kind == "chunk":
            self.listener.streamed(self, *rest)
        elif kind == "closed":
            self.listener.closed(self, *rest)
        else:
            number, seconds, gpu_bytes, replies = rest
            self._gpu_bytes = self._gpu_bytes if gpu_bytes is None else gpu_bytes
            if replies:
                self.listener.replied(self, number, replies)
            self.listener.done(self, number, seconds)

    def _on_start(self, kind: str, rest: list[Any]) -> None:
        if kind == "failed":
            self._fail_start(rest[0])
            return
        future: asyncio.Future[Any] = self.described if kind == "info" else self.ready
        if not future.done():  # whoever waited for it may have been cancelled
            future.set_result(rest[0])

    def _fail_start(self, text: str) -> None:
        for future in (self.described, self.ready):
            if not future.done():
                future.set_exception(StartError(text))
                future.exception()  # whoever waits sees it; where nobody does, it is no news

    def _on_exit(self) -> None:
        """The process is a zombie: read its last words, end what it forked, then let go of its pid."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._paused_at = None
        try:
            while True:
                self._on_message(wire.receive(self._sock))
        except (BlockingIOError, wire.ClosedError):
            pass
        except Exception as error:  # see _on_readable
            self._garbled(error)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fd in self._unsent:
            _close(fd)
        self._unsent.clear()
        self.accepts = False
        how = ending(status)
        self._fail_start(self.killed_for or f"it {how} before it was ready")
        self.gone.set_result(self.killed_for or how)

    # watching

    def tick(self, timeout: float) -> None:
        """Look whether it hangs: a batch, or a slow reader of a stream, that takes longer than `timeout` seconds."""
        if self.gone.done() or not self.ready.done():
            return
        now = self._loop.time()
        self._stopped_ticks = self._stopped_ticks + 1 if _is_stopped(self.pid) else 0
        if self._stopped_ticks >= _STOPPED_TICKS:
            self.kill("somebody stopped it (SIGSTOP)")
        elif self._paused_at is not None:
            if now - self._paused_at > timeout:
                self._drop_readers()
        elif self.outstanding and now - max(self._progress_at, self.outstanding[0].sent_at) > timeout:
            self.kill(f"it hung: nothing for {timeout:g} s")

    def _drop_readers(self) -> None:
        batch = self.outstanding[0]
        for index in batch.streaming & batch.left:
            batch.calls[index].cut(answers.refusal(504, "the stream was read too slowly", "slow_reader"))
        self.resume()


def _pidfd_of(process: subprocess.Popen[bytes]) -> int:
    """What tells when it ends. Raises OSError, with the process gone."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise


def _is_stopped(pid: int) -> bool:
    """Stopped by a signal; one that a debugger looks at is another matter (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


async def list_handlers(python: str, spec: str, paths: tuple[str, ...], env: Mapping[str, str]) -> tuple[str, ...]:
    """The handlers of a module, each as a spec of its own, found by the interpreter that will run them.

    Raises StartError.
    """
    words = (python, str(_BOOTSTRAP), "list", spec, *paths)
    text, status = await _first_line(words, env)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise StartError(f"{python} {ending(status)} while it imported {spec}") from error
    if "error" in found:
        raise StartError(found["error"])
    return tuple(found["handlers"])


async def _first_line(words: Sequence[str], env: Mapping[str, str]) -> tuple[bytes, int]:
    """What a program says first, and its status. Neither what it leaves running nor cancelling holds us up."""
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *words, env=dict(env), stdin=nothing, stdout=pipe, limit=_LIST_BYTES, start_new_session=True
        )
    except OSError as error:
        raise StartError(f"cannot run {words[0]}: {error.strerror}") from error
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = await process.wait()
    return line, status
