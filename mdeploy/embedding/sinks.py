"""Where vectors are written: .npy or .jsonl, such that a run that was killed goes on where it was.

While it is made, OUT is OUT.partial, and OUT.progress says how much of that is known to be on disk and which lines
it was made of. Bytes of the partial file after that mark are dropped when the run goes on. OUT appears at the end,
whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

from mdeploy.embedding.lines import Line
from mdeploy.embedding.types import Encoding, Failure, Vector, numbers
from mdeploy.errors import ConfigError, MdeployError, UsageError

_HEADER = 128
"""Bytes before the numbers of an .npy file, whatever its shape."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a file is: rows and bytes of it, the digest of the lines they came from, what was counted.

    `probe` is the vector of a fixed text: another model under the same name is noticed by it.
    """

    rows: int = 0
    bytes: int = 0
    digest: str = ""
    failed: int = 0
    tokens: int = 0
    probe: Sequence[float] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)


class Sink(ABC):
    """Rows as bytes of one format."""

    encoding: ClassVar[Encoding]

    @abstractmethod
    def render(self, first: int, lines: Sequence[Line], rows: Sequence[Vector | Failure], dim: int) -> bytes:
        """Rows from number `first` on."""

    def begin(self) -> bytes:
        """What stands before the first row."""
        return b""

    def head(self, rows: int, dim: int) -> bytes:
        """What takes the place of `begin` once all rows are there; of the same size."""
        return b""


class Npy(Sink):
    """NumPy's format, version 1.0: a matrix of float32. A row that failed is all NaN."""

    encoding = "base64"

    def begin(self) -> bytes:
        """A header that a reader takes for an empty matrix."""
        return self.head(0, 0)

    def head(self, rows: int, dim: int) -> bytes:
        """https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}".encode()
        size = _HEADER - 10
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + text.ljust(size - 1) + b"\n"

    def render(self, first: int, lines: Sequence[Line], rows: Sequence[Vector | Failure], dim: int) -> bytes:
        """The numbers alone."""
        missing = struct.pack("<f", math.nan) * dim
        return b"".join(missing if isinstance(row, Failure) else _float32(row) for row in rows)


class JsonLines(Sink):
    """One object a line: index, the id the input line had, embedding or error."""

    encoding = "float"

    def render(self, first: int, lines: Sequence[Line], rows: Sequence[Vector | Failure], dim: int) -> bytes:
        """The lines."""
        import orjson

        found = bytearray()
        for index, (line, row) in enumerate(zip(lines, rows, strict=True), first):
            document: dict[str, Any] = {"index": index}
            if line.id is not None:
                document["id"] = line.id
            if isinstance(row, Failure):
                document["error"] = row.reason
            else:
                document["embedding"] = list(numbers(row))
            found += orjson.dumps(document) + b"\n"
        return bytes(found)


_BY_SUFFIX: Mapping[str, type[Sink]] = {".npy": Npy, ".jsonl": JsonLines, ".ndjson": JsonLines}


def for_path(path: Path) -> Sink:
    """The format that the name asks for. Raises UsageError."""
    kind = _BY_SUFFIX.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"cannot tell the format of {path}", hint="-o FILE.npy or -o FILE.jsonl")
    return kind()


class Target(ABC):
    """Where a run puts its rows, and what it knows of an earlier one."""

    sink: Sink
    mark: Mark

    @abstractmethod
    def write(self, data: bytes) -> None:
        """The next rows."""

    @abstractmethod
    def keep(self, mark: Mark) -> None:
        """Make sure that what was written so far outlives this process and this machine's power."""

    @abstractmethod
    def finish(self, mark: Mark, dim: int) -> None:
        """All is written."""


class Pipe(Target):
    """JSON lines on a stream: nothing to go on from."""

    def __init__(self, stream: BinaryIO) -> None:
        self.sink, self.mark, self._stream = JsonLines(), Mark(), stream

    def write(self, data: bytes) -> None:
        """At once: somebody may be reading."""
        self._stream.write(data)
        self._stream.flush()

    def keep(self, mark: Mark) -> None:
        """It is gone already."""

    def finish(self, mark: Mark, dim: int) -> None:
        """Nothing is left to do."""


class File(Target):
    """A file that is whole or not there; use it in a `with`.

    `asked` is what decides the vectors. A partial file that was begun with something else is refused (ConfigError),
    as is one that another process writes (MdeployError); a finished one is only replaced with `overwrite`
    (UsageError).
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.sink, self.path, self._asked = for_path(path), path, dict(asked)
        self.partial = path.with_name(f"{path.name}.partial")
        self.progress = path.with_name(f"{path.name}.progress")
        with _told(path):
            # no buffer of Python's: a disk that is full is noticed by the write that met it
            self._file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0)
        self._is_ours = False
        try:
            self._lock()
            self.mark = self._begin(overwrite=overwrite)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        """A partial file that holds nothing worth going on from is not left behind."""
        with contextlib.suppress(OSError):
            if self._is_ours and self._file.seek(0, os.SEEK_END) <= len(self.sink.begin()):
                self.partial.unlink()
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MdeployError(f"another command writes {self.path}", hint="wait for it to end") from error
        self._is_ours = True

    def _begin(self, *, overwrite: bool) -> Mark:
        if self.path.exists() and not overwrite:
            raise UsageError(f"{self.path} is there already", hint="--overwrite makes it anew")
        with _told(self.path):
            mark = None if overwrite else self._earlier()
            if mark is None:
                self.progress.unlink(missing_ok=True)
                self._file.truncate(0)
                self.write(self.sink.begin())
                return Mark(bytes=len(self.sink.begin()), asked=self._asked)
            self._file.truncate(mark.bytes)
            self._file.seek(mark.bytes)
            return mark

    def _earlier(self) -> Mark | None:
        """The mark of a run that did not end. Raises ConfigError where it cannot be gone on from."""
        import orjson

        try:
            document = orjson.loads(self.progress.read_bytes())
            mark = Mark(**document)
        except FileNotFoundError:
            return None
        except (orjson.JSONDecodeError, TypeError) as error:
            raise self._unusable(f"{self.progress} is damaged") from error
        if mark.asked != self._asked:
            raise self._unusable(f"{self.partial} was begun differently ({_difference(mark.asked, self._asked)})")
        if mark.bytes > self._file.seek(0, os.SEEK_END):
            raise self._unusable(f"{self.partial} is shorter than {self.progress.name} says")
        return mark

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(why, hint="--overwrite begins anew")

    def write(self, data: bytes) -> None:
        """At the end of the partial file. Raises MdeployError where the disk takes no more."""
        view = memoryview(data)
        with _told(self.partial):
            while view:
                view = view[self._file.write(view) :]

    def keep(self, mark: Mark) -> None:
        """First the rows, then the mark that speaks of them."""
        if mark.rows == 0:
            return
        with _told(self.partial):
            os.fdatasync(self._file.fileno())
            _replace(self.progress, dataclasses.asdict(dataclasses.replace(mark, asked=self._asked)))

    def finish(self, mark: Mark, dim: int) -> None:
        """Give the file its name."""
        self.keep(mark)
        with _told(self.path):
            self._file.seek(0)
            self.write(self.sink.head(mark.rows, dim))
            os.fsync(self._file.fileno())
            self._is_ours = False
            self.partial.replace(self.path)
            self.progress.unlink(missing_ok=True)
            _sync(self.path.parent)


def _float32(row: Vector) -> bytes:
    return row if isinstance(row, bytes) else struct.pack(f"<{len(row)}f", *row)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)}, now {now.get(name)}" for name in names)


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    """Write a small file such that it is the old or the new one, whenever power goes."""
    import orjson

    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(orjson.dumps(document))
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MdeployError(
            f"cannot write {path}: {error.strerror}", hint="the same command goes on from there"
        ) from error
