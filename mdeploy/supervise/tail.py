"""Reading the log of a service: the end of it, the part since a time, what matches, what comes next.

It knows the files `logs` writes and nothing of their writer's process: files are told apart by
inode, and stay open while they are in use, so that no inode comes back as another file's.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import FileIO
from pathlib import Path

from mdeploy.errors import UsageError
from mdeploy.supervise.logs import rotated, stamp

_BLOCK = 64 << 10
_LONGEST = 1 << 20
"""A line is handed out in parts of this size, should a file have one that long."""

_TRIES = 10
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_AGO = re.compile(r"(?:\d+[smhd])+", re.ASCII)
_SINCE_HINT = "10m, 2h, 1d12h, 2026-11-21T13:00 or '2026-11-21 13:00' (local time; a Z or +08:00 behind it is heeded)"


@dataclass(frozen=True, slots=True)
class Query:
    """Which lines: written at `since` (Unix time) or later, matching `pattern`, and of these the last `count`."""

    count: int | None = None
    since: float | None = None
    pattern: re.Pattern[str] | None = None


def parse_since(text: str, now: float) -> float:
    """A Unix time from an age (`10m`) or a date. Raises UsageError for nonsense and for the future."""
    wanted = text.strip()
    when = _age(wanted, now) if _AGO.fullmatch(wanted) else _date(wanted)
    if when is None:
        raise UsageError(f"--since {text!r} is no time", hint=_SINCE_HINT)
    if when > now:
        raise UsageError(f"--since {text!r} lies in the future", hint=_SINCE_HINT)
    return when


def _age(text: str, now: float) -> float | None:
    try:
        parts = re.findall(r"(\d+)([smhd])", text)
        return now - sum(timedelta(**{_UNITS[unit]: int(number)}).total_seconds() for number, unit in parts)
    except (OverflowError, ValueError):
        return None


def _date(text: str) -> float | None:
    try:
        return datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def compile_pattern(text: str) -> re.Pattern[str]:
    """A Python regular expression. Raises UsageError for one that is none."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"--grep {text!r} is no regular expression: {error}", hint="a literal ( is written \\("
        ) from error


def split(line: bytes) -> tuple[bytes, bytes]:
    """The stamp of a line and its text; a line of an earlier mdeploy has no stamp."""
    match = _STAMP.match(line)
    return (match[1], line[match.end() :]) if match else (b"", line)


class Filter:
    """Tells which lines a query wants; they must come in their order.

    A line without a time has that of the line before it, and at the beginning of a log none:
    such a line is older than any `since`.
    """

    def __init__(self, query: Query) -> None:
        self._pattern = query.pattern
        self._since = b"" if query.since is None else stamp(query.since)
        self._time = b""

    def __call__(self, line: bytes) -> bool:
        """True for a line that is wanted."""
        when, text = split(line)
        self._time = when or self._time
        if self._time < self._since:
            return False
        return self._pattern is None or self._pattern.search(text.decode(errors="replace")) is not None

    def of(self, lines: list[bytes]) -> list[bytes]:
        """Those of these lines that are wanted."""
        return [line for line in lines if self(line)]


def read(
    path: Path, query: Query, alive: Callable[[], bool] | None = None, poll_s: float = 0.2
) -> Iterator[list[bytes]]:
    """Lines without their newline, in batches, stamps included; with `alive` also those that follow.

    Following goes on across rotations and truncation, and ends once `alive` says no and all is read.
    """
    wanted = Filter(query)
    with contextlib.closing(_Chain(path)) as chain:
        if query.count is not None and query.since is None and query.pattern is None:
            chain.skip_to_last(query.count)
        past = chain.all() if alive is not None else itertools.chain(chain.all(), chain.rest())
        yield from last(map(wanted.of, past), query.count)
        while alive is not None:
            going, came = alive(), False
            for batch in chain.all():
                came = True
                yield wanted.of(batch)
            if not going:
                yield from map(wanted.of, chain.rest())
                return
            if not came:
                time.sleep(poll_s)


def last(batches: Iterable[list[bytes]], count: int | None) -> Iterator[list[bytes]]:
    """The last `count` lines of batches, in one; without a count all of them as they come."""
    if count is None:
        yield from batches
        return
    yield list(collections.deque(itertools.chain.from_iterable(batches), maxlen=count))


class _Chain:
    """The files of a log, read from the oldest to the live one and on into those that come.

    `_files` are those still to be read, the first of them being read now. `_done` are older ones
    that lie in the directory still: they are held open so that they are known again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[FileIO] = []
        self._done: list[FileIO] = []
        self._partial = b""
        self._look()

    def skip_to_last(self, count: int) -> None:
        """Begin `count` lines before the end."""
        for index in range(len(self._files) - 1, -1, -1):
            offset, count = _before_last(self._files[index], count)
            self._files[index].seek(offset)
            if not count:
                self._done += self._files[:index]
                del self._files[:index]
                return

    def all(self) -> Iterator[list[bytes]]:
        """Every line there is by now."""
        while batch := self.lines():
            yield batch

    def lines(self) -> list[bytes]:
        """The next whole lines, a block at most; none where all is read.

        A file is left only when it was read to its end after a newer one had been seen.
        """
        while self._files or self._look():
            if whole := self._block():
                return whole
            if not self._is_at_end():
                continue
            if len(self._files) > 1:
                if rest := self._leave():
                    return [rest]
            elif not self._look():
                break
        return []

    def rest(self) -> Iterator[list[bytes]]:
        """A last line that has no end."""
        if self._partial:
            yield [self._partial]

    def close(self) -> None:
        """Let go of all files."""
        for file in (*self._done, *self._files):
            file.close()

    def _block(self) -> list[bytes]:
        file = self._files[0]
        if os.fstat(file.fileno()).st_size < file.tell():  # somebody emptied it
            file.seek(0)
            self._partial = b""
        *whole, self._partial = (self._partial + file.read(_BLOCK)).split(b"\n")
        if len(self._partial) > _LONGEST:
            whole.append(self._partial)
            self._partial = b""
        return whole

    def _is_at_end(self) -> bool:
        return os.fstat(self._files[0].fileno()).st_size == self._files[0].tell()

    def _leave(self) -> bytes:
        """Go on to the next file; what the old one ended with is a line, with or without its newline."""
        self._done.append(self._files.pop(0))
        rest, self._partial = self._partial, b""
        return rest

    def _look(self) -> bool:
        """Take up files that have come, let go of those that are read and gone; True where one came."""
        known = {_identity(file) for file in (*self._done, *self._files)}
        found = _open_all(self._path)
        came = [file for identity, file in reversed(found.items()) if identity not in known]
        for identity, file in found.items():
            if identity in known:
                file.close()
        for file in [file for file in self._done if _identity(file) not in found]:
            self._done.remove(file)
            file.close()
        self._files += came
        return bool(came)


def _open_all(path: Path) -> dict[tuple[int, int], FileIO]:
    """The files of a log by their identity, the newest first; again where they were rotated meanwhile."""
    for attempt in range(_TRIES, -1, -1):
        found: dict[tuple[int, int], FileIO] = {}
        for name in _names(path):
            with contextlib.suppress(FileNotFoundError):
                file = FileIO(str(name), "rb")
                if found.setdefault(_identity(file), file) is not file:
                    file.close()
        if not attempt or _identities(path) <= found.keys():
            return found
        for file in found.values():
            file.close()
    raise AssertionError("unreachable")


def _names(path: Path) -> list[Path]:
    """The live log and the rotated ones, the newest first; in the midst of a rotation one may be missing."""
    number = re.compile(rf"{re.escape(path.name)}(?:\.([1-9]\d*))?")
    try:
        matches = [number.fullmatch(entry.name) for entry in path.parent.iterdir()]
    except FileNotFoundError:
        return []
    return [rotated(path, n) for n in sorted(int(match[1] or 0) for match in matches if match)]


def _identities(path: Path) -> set[tuple[int, int]]:
    found = set()
    for name in _names(path):
        with contextlib.suppress(FileNotFoundError):
            status = name.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def _identity(file: FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _before_last(file: FileIO, count: int) -> tuple[int, int]:
    """Where the last `count` lines of a file begin, and how many lines it has too few. Reads backwards."""
    end = os.fstat(file.fileno()).st_size
    if not count or not end:
        return end, count
    missing = count + (os.pread(file.fileno(), 1, end - 1) == b"\n")
    while end:
        start = max(0, end - _BLOCK)
        block = os.pread(file.fileno(), end - start, start)
        at = len(block)
        while missing and (at := block.rfind(b"\n", 0, at)) >= 0:
            missing -= 1
        if not missing:
            return start + at + 1, 0
        end = start
    return 0, missing - 1
