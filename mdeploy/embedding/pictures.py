"""Pictures to ask a multimodal model about, made without an imaging library."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from mdeploy.errors import ConfigError, NotFoundError, UsageError

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_COLOURS = {"red": b"\xd0\x20\x20", "blue": b"\x20\x40\xd0"}
_SIDE = 112


def read(path: Path) -> Mapping[str, str]:
    """A file as an input. Raises NotFoundError, ConfigError, or UsageError for what is no picture by its name."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{path} is no picture by its name", hint=f"one of {', '.join(_KINDS)}")
    try:
        return _item(kind, path.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def item(colour: str, text: str | None = None) -> Mapping[str, str]:
    """A square of one colour on white, alone or with a text."""
    found = _item("image/png", _png(_COLOURS[colour]))
    return found if text is None else {**found, "text": text}


def _item(kind: str, data: bytes) -> dict[str, str]:
    return {"image": f"data:{kind};base64,{base64.b64encode(data).decode()}"}


def _png(colour: bytes) -> bytes:
    """https://www.w3.org/TR/png-3/: every row begins with its filter, 0."""
    quarter = _SIDE // 4
    plain = b"\0" + b"\xff\xff\xff" * _SIDE
    crossed = b"\0" + b"\xff\xff\xff" * quarter + colour * 2 * quarter + b"\xff\xff\xff" * quarter
    rows = plain * quarter + crossed * 2 * quarter + plain * quarter
    head = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
