"""What travels between the edge, the decoders and the worker on the GPU: pictures as raw pixels, prompts as token ids.

A decoder answers with height and width, then height x width x 3 bytes of RGB. Work for the model is

    n, size of what follows the table, (number of its text, height, width) of each of the n pictures,
    then `embed.work` (ids, image tokens among them), then the pixels of each picture

Numbers are little-endian uint32. Nothing but the standard library.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdeploy.apps.embed import work
from mdeploy.serving.handler import Buffer

BASE64 = ((b"content-transfer-encoding", b"base64"),)
"""Headers of a decoder's request whose picture stood in JSON: the edge leaves it as it came."""

_PAIR = struct.Struct("<II")
_ENTRY = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the model takes it: upright, scaled, height x width x 3 bytes of RGB."""

    height: int
    width: int
    pixels: Buffer


@dataclass(frozen=True, slots=True)
class Input:
    """One prompt, and the picture in it."""

    ids: Sequence[int]
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Some inputs of one request; `dim` as in `embed.work`."""

    inputs: tuple[Input, ...]
    dim: int = 0

    @property
    def tokens(self) -> int:
        """What it costs."""
        return sum(len(each.ids) for each in self.inputs)


def pack_picture(height: int, width: int, pixels: bytes) -> bytes:
    """What a decoder answers."""
    return _PAIR.pack(height, width) + pixels


def picture(body: Buffer) -> Picture:
    """The inverse. Raises ValueError for bytes that are none."""
    view = memoryview(body)
    if len(view) < _PAIR.size:
        raise ValueError("no picture")
    height, width = _PAIR.unpack_from(view)
    if len(view) != _PAIR.size + height * width * 3:
        raise ValueError("a picture is cut off")
    return Picture(height, width, view[_PAIR.size :])


def pack(inputs: Sequence[Input], dim: int = 0) -> bytes:
    """Work as bytes."""
    pictures = {index: each.picture for index, each in enumerate(inputs) if each.picture is not None}
    texts = work.pack((work.Tokens(each.ids) for each in inputs), dim)
    table = [_ENTRY.pack(index, one.height, one.width) for index, one in pictures.items()]
    return b"".join((_PAIR.pack(len(table), len(texts)), *table, texts, *(one.pixels for one in pictures.values())))


def unpack(body: Buffer) -> Work:
    """The inverse; pixels are views of `body`. Raises ValueError for bytes that are no work."""
    view = memoryview(body)
    try:
        count, size = _PAIR.unpack_from(view)
        table = [_ENTRY.unpack_from(view, _PAIR.size + place * _ENTRY.size) for place in range(count)]
    except struct.error as error:
        raise ValueError("no packed inputs") from error
    start = _PAIR.size + count * _ENTRY.size
    texts = work.unpack(view[start : start + size])
    pictures = _pictures(view[start + size :], table)
    inputs = tuple(Input(text.ids, pictures.get(index)) for index, text in enumerate(texts.texts))
    return Work(inputs, texts.dim)


def _pictures(view: memoryview, table: Sequence[tuple[int, ...]]) -> Mapping[int, Picture]:
    found, start = {}, 0
    for index, height, width in table:
        end = start + height * width * 3
        found[index] = Picture(height, width, view[start:end])
        start = end
    if start != len(view):
        raise ValueError("packed pictures are cut off")
    return found
