"""Writing the log of a service: pumped from the engine's output, stamped, kept small by rotation.

Whatever happens to the disk or the file, the engine's pipe is drained: an engine that cannot
print stands still. Reading is `tail`'s part.
"""

from __future__ import annotations

import collections
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

LINE_BYTES = 16 << 10
"""Longest line: more text without an end is cut into lines of this size."""

_TAIL_LINES = 2000
"""Lines kept in memory for explaining a failure: vLLM prints up to 170 after the one that matters."""

# A progress bar ends its lines with \r. One at the end of what was read may be half of a \r\n.
_LINE_END = re.compile(rb"\r*\n|\r+(?=[^\r\n])")


def stamp(unix: float) -> bytes:
    """A time as it stands before a line: RFC 3339, UTC, milliseconds; its order is that of time."""
    text = datetime.fromtimestamp(unix, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z").encode()


class LogWriter:
    """Appends stamped lines to a 0600 file, `keep` rotated ones beside it: log → log.1 → … → log.N.

    No file grows beyond `limit` bytes (or one line, where that is longer). Any thread may write.
    Nothing is raised: a full disk, or a directory that is gone, loses lines but never the service,
    and the log says how many once it can be written again.
    """

    def __init__(self, path: Path, limit: int, keep: int = 3, clock: Callable[[], float] = time.time) -> None:
        self._path, self._limit, self._keep, self._clock = path, limit, keep, clock
        self._mutex = threading.Lock()
        self._fd = -1
        self._lost = 0
        self._why = ""

    def write(self, line: bytes) -> None:
        """Append one line, with or without its newline, below the present time."""
        with self._mutex:
            now = stamp(self._clock())
            try:
                if self._lost:
                    self._append(b"%s mdeploy: %d lines were lost: %s\n" % (now, self._lost, self._why.encode()))
                    self._lost = 0
                self._append(b"%s %s\n" % (now, line.rstrip(b"\r\n")))
            except OSError as error:
                self._lost, self._why = self._lost + 1, error.strerror or str(error)

    def note(self, text: str) -> None:
        """Append something mdeploy itself has to say, a line each."""
        for line in text.splitlines():
            self.write(_note(line))

    def close(self) -> None:
        """Let go of the file; the next line opens it again."""
        with self._mutex:
            self._close()

    def _append(self, data: bytes) -> None:
        size = self._size()
        if size and size + len(data) > self._limit:
            self._rotate()
            size = self._size()
        if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a full disk, or a power cut, took the end
            data = b"\n" + data
        if os.write(self._fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _size(self) -> int:
        """Bytes in the live log. One that was removed, renamed or replaced by somebody is opened anew."""
        if self._fd >= 0:
            ours = os.fstat(self._fd)
            try:
                if os.path.samestat(ours, os.lstat(self._path)):
                    return ours.st_size
            except FileNotFoundError:
                pass
            self._close()
        self._open()
        return os.fstat(self._fd).st_size

    def _open(self) -> None:
        """Open the log. What stands there and is no file is removed: a link may lead anywhere."""
        try:
            if not stat.S_ISREG(os.lstat(self._path).st_mode):
                self._path.unlink()
        except FileNotFoundError:
            pass
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)

    def _rotate(self) -> None:
        """Move every file one further; where that is not allowed the live one is emptied, for the bound holds."""
        try:
            for number in range(self._keep, 0, -1):
                newer = rotated(self._path, number - 1)
                if newer.exists():
                    newer.rename(rotated(self._path, number))
            if not self._keep:
                self._path.unlink()
            self._remove_from(self._keep + 1)
        except OSError:
            os.ftruncate(self._fd, 0)
        else:
            self._close()

    def _remove_from(self, number: int) -> None:
        """Remove what was kept when more files were to be."""
        while (surplus := rotated(self._path, number)).exists():
            surplus.unlink()
            number += 1

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def rotated(path: Path, number: int) -> Path:
    """Name of the live log (0) or of a rotated one (1 is the newest)."""
    return path.with_name(f"{path.name}.{number}") if number else path


def _note(line: str) -> bytes:
    return f"mdeploy: {line}".encode(errors="replace")


class Pump(threading.Thread):
    """Carries an engine's output to its log; keeps the tail for whoever must explain a failure.

    `writer` is None where a service manager keeps the log: then `echo` alone gets the lines.
    """

    def __init__(self, source: IO[bytes], writer: LogWriter | None, echo: Callable[[bytes], None] | None) -> None:
        super().__init__(name="log-pump", daemon=True)
        self._source, self._writer, self._echo = source, writer, echo
        self._lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._rest = b""

    def run(self) -> None:
        """Until the last process that holds the pipe is gone."""
        while data := os.read(self._source.fileno(), 4 * LINE_BYTES):
            for line in self._whole(self._rest + data):
                self._take(line)
        if self._rest.strip(b"\r"):
            self._take(self._rest.strip(b"\r"))
            self._rest = b""

    def lines(self) -> list[str]:
        """The last lines as the engine wrote them, oldest first; the last may have no end yet."""
        rest = self._rest.strip(b"\r").decode(errors="replace").rstrip()
        return [*self._lines, rest] if rest else list(self._lines)

    def note(self, text: str) -> None:
        """Say something of our own where the engine's lines go; it is not among `lines`."""
        for line in text.splitlines():
            self._carry(_note(line))

    def _whole(self, data: bytes) -> Iterator[bytes]:
        """Lines without their ends; the beginning of one stays in `_rest`."""
        start = 0
        for end in _LINE_END.finditer(data):
            text = data[start : end.start()]
            start = end.end()
            if text or end[0].endswith(b"\n"):
                yield from _pieces(text) if text else (b"",)
        while len(data) - start > LINE_BYTES:
            yield data[start : start + LINE_BYTES]
            start += LINE_BYTES
        self._rest = data[start:]

    def _take(self, line: bytes) -> None:
        self._lines.append(line.decode(errors="replace").rstrip())
        self._carry(line)

    def _carry(self, line: bytes) -> None:
        if self._writer:
            self._writer.write(line)
        if self._echo:
            self._echo(line + b"\n")


def _pieces(text: bytes) -> Iterator[bytes]:
    return (text[at : at + LINE_BYTES] for at in range(0, len(text), LINE_BYTES))
