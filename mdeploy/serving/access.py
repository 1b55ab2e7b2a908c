"""The access log: one JSON line a request, written in batches, so that it costs next to nothing.

Queries and headers are never logged: keys and other secrets stand there.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
from typing import NamedTuple

import orjson

_DELAY_S = 1.0
_MANY = 512


class Access(NamedTuple):
    """One answered request. Status 499: the client left before the answer.

    `seconds` from its head to the last byte handed to the kernel, `waited` of them in the queue.
    """

    time: float
    id: str
    method: str
    path: str
    status: int
    seconds: float
    bytes_in: int
    bytes_out: int
    client: str
    handler: str
    waited: float


class AccessLog:
    """Collects lines and writes them within a second. A timer runs only while there is something to write."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = sys.stdout.fileno() if fd is None else fd
        self._waiting: list[Access] = []
        self._timer: asyncio.TimerHandle | None = None
        self._complained = False

    def add(self, access: Access) -> None:
        """Take a line; to be called in the event loop."""
        self._waiting.append(access)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELAY_S, self.flush)
        elif len(self._waiting) >= _MANY:
            self.flush()

    def flush(self) -> None:
        """Write what has come together; also to be called at the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        if waiting and self._fd >= 0:
            self._write(b"".join(map(_line, waiting)))

    def _write(self, text: bytes) -> None:
        left = memoryview(text)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except BrokenPipeError as error:
            # Whoever read the log is gone: serving goes on without one.
            self._fd = -1
            print(f"mdeploy: the access log ends: {error.strerror}", file=sys.stderr)  # noqa: T201
        except OSError as error:
            # A full disk: these lines are lost, later ones perhaps not.
            if not self._complained:
                print(f"mdeploy: lines of the access log are lost: {error.strerror}", file=sys.stderr)  # noqa: T201
            self._complained = True
        else:
            self._complained = False


@functools.lru_cache(maxsize=4)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def _line(access: Access) -> bytes:
    line = {
        "time": f"{_second(int(access.time))}.{int(access.time % 1 * 1000):03d}Z",
        "id": access.id,
        "method": access.method,
        "path": access.path.encode("utf-8", "replace").decode(),
        "status": access.status,
        "ms": round(access.seconds * 1000, 3),
        "bytes_in": access.bytes_in,
        "bytes_out": access.bytes_out,
        "client": access.client,
        "handler": access.handler,
        "wait_ms": round(access.waited * 1000, 3),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
