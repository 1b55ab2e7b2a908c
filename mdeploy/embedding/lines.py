"""Texts of a file, one a line, however large it is: plain text or JSON lines, gzipped or not, or standard input.

Row i of the output belongs to line i of the input, so a line that holds no text is a failure of that line and never
left out. Only empty lines at the very end do not count.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast

from mdeploy.embedding.types import Failure, Item
from mdeploy.errors import ConfigError, NotFoundError, UsageError

Format = Literal["text", "jsonl"]
LONGEST_LINE = 64 << 20
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line: what to embed or why it cannot be, the `id` it brought along, and a digest of its bytes."""

    item: Item | Failure
    digest: bytes
    size: int
    id: Any = None


def format_of(path: str, field: str | None) -> Format:
    """By its name; standard input is plain text unless a field is named."""
    name = path.lower().removesuffix(".gz")
    return "jsonl" if name.endswith(_JSON_SUFFIXES) or (path == "-" and field) else "text"


class Source:
    """A file that is read once; use it in a `with`. `path` is `-` for standard input."""

    def __init__(self, path: str, field: str | None = None) -> None:
        self.path, self.format, self.field = path, format_of(path, field), field or "text"
        if field and self.format == "text":
            raise UsageError(f"--field goes with JSON lines, {path} is plain text", hint="name the file *.jsonl")
        self._raw = sys.stdin.buffer if path == "-" else _open(Path(path))
        self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if path.endswith(".gz") else self._raw

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path != "-":
            self._raw.close()

    @property
    def size(self) -> int | None:
        """Bytes of the file as it lies there; None where that is not known."""
        path = Path(self.path)
        return path.stat().st_size if self.path != "-" and path.is_file() else None

    @property
    def position(self) -> int:
        """Bytes of it that were read."""
        return self._raw.tell() if self.path != "-" and self._raw.seekable() else 0

    def lines(self) -> Iterator[Line]:
        """Every line. Raises ConfigError for a file that cannot be read to its end."""
        empty = 0
        with _readable(self.path):
            for number, (raw, digest, size) in enumerate(_raw_lines(self._stream)):
                text = raw if raw is None or number else raw.removeprefix(_BOM)
                if text is not None and not text.strip():
                    empty += 1
                    continue
                for _ in range(empty):
                    yield Line(Failure("the line is empty"), b"", 0)
                empty = 0
                yield self._parse(text, digest, size)

    def _parse(self, raw: bytes | None, digest: bytes, size: int) -> Line:
        if raw is None:
            return Line(Failure(f"the line is longer than {LONGEST_LINE >> 20} MiB"), digest, size)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return Line(Failure("the line is not UTF-8"), digest, size)
        if self.format == "text":
            return Line(text, digest, size)
        item, identity = _from_json(text, self.field)
        return Line(item, digest, size, identity)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is no whole gzip file: {error}", hint="copy it again") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _raw_lines(stream: BinaryIO) -> Iterator[tuple[bytes | None, bytes, int]]:
    """Each line without its end, its digest and size; None for one that is too long to be kept."""
    while line := stream.readline(LONGEST_LINE):
        digest, size = hashlib.blake2b(line, digest_size=16), len(line)
        whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
        while not whole:
            more = stream.readline(LONGEST_LINE)
            digest.update(more)
            size += len(more)
            whole = not more or more.endswith(b"\n")
        yield line.rstrip(b"\r\n") if size == len(line) else None, digest.digest(), size


def _from_json(text: str, field: str) -> tuple[Item | Failure, Any]:
    """What to embed of one JSON line, and its id."""
    import orjson

    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return Failure(f"the line is no JSON: {error.msg}"), None
    if isinstance(found, str):
        return found, None
    if not isinstance(found, dict):
        return Failure("the line is neither a string nor an object"), None
    identity = found.get("id")
    if isinstance(found.get("image"), str):
        return {name: found[name] for name in (field, "image") if isinstance(found.get(name), str)}, identity
    value = found.get(field)
    if isinstance(value, str):
        return value, identity
    if field in found:
        return Failure(f"{field!r} of the line is no text"), identity
    there = ", ".join(sorted(found)) or "nothing"
    return Failure(f"the line has no text in {field!r}; it has {there}"), identity
