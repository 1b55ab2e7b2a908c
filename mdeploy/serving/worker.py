"""The worker process: one handler on one device, batches in, replies out, until the edge goes away.

It speaks over one socket and knows nothing of HTTP. Everything that can go wrong with the user's class before it
is ready is told to the edge as text, with the traceback in the log.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdeploy.serving import load, wire
from mdeploy.serving.handler import Handler, Request
from mdeploy.serving.info import HandlerInfo, Reply
from mdeploy.serving.runner import Answered, Chunk, Closed, Runner

_PR_SET_PDEATHSIG = 1
_MEMORY_EVERY_S = 5.0
_HERE = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to run: `overrides` and `config` as `load.describe` takes them; `paths` go before sys.path."""

    spec: str
    device: str
    paths: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# edge -> worker: ("batch", number, [Request, …]) · ("cancel", number, index) · ("end",)
# worker -> edge: ("info", HandlerInfo) · ("ready", HandlerInfo) · ("failed", text)
#                 ("replies", number, [(index, Reply), …]) · ("closed", number, index, Reply | None)
#                 ("chunk", number, index, bytes, Reply | None) · ("done", number, seconds, gpu_bytes, last replies)


def main(fd: int, parent: int, job: Job) -> int:
    """Serve the edge at the other end of `fd`; returns the exit status."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the edge's to handle
    with socket.socket(fileno=fd) as sock:
        sock.set_inheritable(False)
        try:
            runner, handler = _prepare(sock, job)
        except wire.ClosedError:
            return 0
        except BaseException as error:  # whatever ends a user's class before it is ready is told, and then ends us
            _tell_failure(sock, error)
            return 1
        with contextlib.suppress(wire.ClosedError):
            _Loop(sock, runner).run()
        handler.close()
    return 0


def _die_with(parent: int) -> None:
    """The kernel ends us when the edge dies, whatever we are busy with."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)


def _prepare(sock: socket.socket, job: Job) -> tuple[Runner, Handler]:
    """Import, describe, load onto the device, answer the example."""
    (cls,) = load.handlers(job.spec, job.paths)
    info = load.describe(cls, job.overrides, job.config)
    wire.send(sock, ("info", info))
    handler = cls()
    handler.init(job.device)
    info = load.measured(info, handler)
    runner = Runner(handler, info)
    if info.example is not None:
        warm_up(runner, info)
    wire.send(sock, ("ready", info))
    return runner, handler


def warm_up(runner: Runner, info: HandlerInfo) -> None:
    """A class that cannot answer its own example does not work. Raises LoadError."""
    assert info.example is not None
    for event in runner.run([info.example]):
        if isinstance(event, Chunk):  # it streams, perhaps for ever
            return
        replies = event.replies if isinstance(event, Answered) else ()
        failure = event.error if isinstance(event, Closed) else next((r for _, r in replies if r.status >= 400), None)
        if failure is not None:
            raise load.LoadError(f"{info.name} answers its own example with {failure.status}: {failure.message}")


def _tell_failure(sock: socket.socket, error: BaseException) -> None:
    try:
        wire.send(sock, ("failed", last_words(error)))
    except (wire.ClosedError, OSError):
        return


def last_words(error: BaseException) -> str:
    """What ended us, in a line; the traceback goes to the log, unless it is a plain mistake that needs none."""
    if isinstance(error, load.LoadError):
        return str(error)
    traceback.print_exception(type(error), error, _own_frames(error))
    sys.stderr.flush()
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    if isinstance(error, SyntaxError):
        return " ".join(text.split())
    return text.splitlines()[-1] + _place(error)


def _own_frames(error: BaseException) -> Any:
    """The traceback from the user's first line on; ours and importlib's say nothing to them."""
    trace = error.__traceback__
    while trace and trace.tb_next and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _is_ours(file: str) -> bool:
    return file.startswith(("<frozen importlib", importlib.__file__, _HERE))


def _place(error: BaseException) -> str:
    """Where it was raised, in the user's own file rather than deep in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _is_ours(f.filename) and "site-packages" not in f.filename and f.filename[0] != "<"]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


class _Loop:
    """Batches one after the other; the next one waits in `_waiting` or in the socket meanwhile."""

    def __init__(self, sock: socket.socket, runner: Runner) -> None:
        self._sock, self._runner = sock, runner
        self._poll = select.poll()  # select() takes no descriptor above 1023, and ours has the edge's number
        self._poll.register(sock, select.POLLIN)
        self._waiting: collections.deque[tuple[int, list[Request]]] = collections.deque()
        self._cancelled: set[tuple[int, int]] = set()
        self._ended = False
        self._measured = 0.0

    def run(self) -> None:
        """Until the edge says end, or is gone (ClosedError)."""
        while not self._ended or self._waiting:
            if not self._waiting:
                self._take(wire.receive(self._sock))
            if self._waiting:
                self._answer(*self._waiting.popleft())

    def _take(self, message: Any) -> None:
        kind, *rest = message
        if kind == "batch":
            self._waiting.append((rest[0], rest[1]))
        elif kind == "cancel":
            self._cancelled.add((rest[0], rest[1]))
        else:
            self._ended = True

    def _is_gone(self, number: int, index: int) -> bool:
        """Whether the edge said so; asked before each request and between the parts of a stream."""
        while self._poll.poll(0):
            self._take(wire.receive(self._sock))
        return (number, index) in self._cancelled

    def _answer(self, number: int, requests: list[Request]) -> None:
        started = time.monotonic()
        events = self._runner.run(requests, lambda index: self._is_gone(number, index))
        left = len(requests)
        last: tuple[tuple[int, Reply], ...] = ()
        for event in events:
            if isinstance(event, Answered):
                left -= len(event.replies)
                if left == 0:  # one message less: the common case is a batch that is answered at once
                    last = event.replies
                else:
                    wire.send(self._sock, ("replies", number, event.replies))
            elif isinstance(event, Chunk):
                wire.send(self._sock, ("chunk", number, event.index, event.data, event.head))
            else:
                wire.send(self._sock, ("closed", number, event.index, event.error))
        self._cancelled = {pair for pair in self._cancelled if pair[0] > number}
        wire.send(self._sock, ("done", number, time.monotonic() - started, self._gpu_memory(), last))

    def _gpu_memory(self) -> int | None:
        """Bytes torch holds on the device, now and then; None where there is nothing new to say."""
        torch = sys.modules.get("torch")
        if torch is None or time.monotonic() - self._measured < _MEMORY_EVERY_S:
            return None
        self._measured = time.monotonic()
        return int(torch.cuda.memory_reserved()) if torch.cuda.is_initialized() else 0


def list_handlers(spec: str, paths: tuple[str, ...]) -> int:
    """Print the handlers of a module, each as a spec of its own, or why there are none; returns the exit status."""
    out = os.dup(1)
    os.dup2(2, 1)  # what the module prints, or anything it starts, must not end in our JSON
    try:
        found = load.handlers(spec, paths)
        where = spec.partition(":")[0]
        answer: dict[str, Any] = {"handlers": [f"{where}:{cls.__qualname__}" for cls in found]}
    except BaseException as error:  # as in `main`
        answer = {"error": last_words(error)}
    sys.stdout.flush()
    with os.fdopen(out, "w") as file:
        print(json.dumps(answer), file=file)
    return 0
