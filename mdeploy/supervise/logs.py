"""The log of a service: pumped from the engine's output, kept small by rotation, followed by readers."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

_KEEP = 3
"""Rotated files beside the live one."""

_TAIL_LINES = 2000
"""Lines kept in memory for explaining a failure: vLLM prints up to 170 after the one that matters."""


class LogWriter:
    """Appends lines to a 0600 file and rotates it at `limit` bytes: log → log.1 → … → log.3."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        self._file: FileIO | None = None
        self._size = 0

    def write(self, line: bytes) -> None:
        """Append one line. A full disk, or a log somebody removed, loses lines but never the service."""
        try:
            if self._file is None:
                self._open()
            elif self._size >= self._limit:
                self._rotate()
            if self._file is not None:
                self._size += self._file.write(line)
        except OSError:
            self.close()  # to be opened again at the next line

    def _open(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = FileIO(fd, "ab")
        self._size = os.fstat(fd).st_size

    def _rotate(self) -> None:
        self.close()
        for number in range(_KEEP - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.rename(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.rename(self._path.with_name(f"{self._path.name}.1"))
        self._open()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Pump(threading.Thread):
    """Carries an engine's output to its log; keeps the tail for whoever must explain a failure."""

    def __init__(self, source: BinaryIO, writer: LogWriter, echo: Callable[[bytes], None] | None) -> None:
        super().__init__(name="log-pump", daemon=True)
        self._source, self._writer, self._echo = source, writer, echo
        self._lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)

    def run(self) -> None:
        """Until the last process that holds the pipe is gone."""
        for line in self._source:
            self._writer.write(line)
            self._lines.append(line.decode(errors="replace").rstrip())
            if self._echo:
                self._echo(line)

    def lines(self) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines)


def read(path: Path, count: int, alive: Callable[[], bool] | None = None, poll_s: float = 0.2) -> Iterator[bytes]:
    """The last `count` lines, reaching into the newest rotated file; with `alive` also what follows.

    Following goes on across rotations, and ends once `alive` says no and all is read.
    """
    with contextlib.closing(_Position(path)) as position:
        yield b"".join(_last(path, position.rest(), count))
        while alive is not None:
            going = alive()
            if data := position.rest():
                yield data
            elif not position.renew():
                if not going:
                    return
                time.sleep(poll_s)


class _Position:
    """How far a log has been read; the file stays open so that a rotation cuts nothing off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self.renew()

    def rest(self) -> bytes:
        """What was written since the last call."""
        return self._file.read() if self._file else b""

    def renew(self) -> bool:
        """Go on in the newest file; True where that is another one than before."""
        try:
            newest = self._path.open("rb")
        except FileNotFoundError:
            return False
        if self._file and os.path.sameopenfile(self._file.fileno(), newest.fileno()):
            newest.close()
            return False
        self.close()
        self._file = newest
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._file:
            self._file.close()


def _last(path: Path, live: bytes, count: int) -> list[bytes]:
    lines = live.splitlines(keepends=True)
    rotated = path.with_name(f"{path.name}.1")
    if len(lines) < count and rotated.is_file():
        lines = rotated.read_bytes().splitlines(keepends=True) + lines
    return lines[len(lines) - min(count, len(lines)) :]
