"""Vectors as JSON, from the bytes that workers answer with: nothing is a Python number on the way.

A piece of work at a time: writing thousands of vectors takes long, and other requests get their turn in between.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Callable, Sequence

import numpy as np
import orjson

from mdeploy.serving.handler import Buffer

Write = Callable[[int, Buffer, int], bytes]
"""Part of an answer: from the number of its first input, the bytes of their vectors, and how many they are."""

_HEAD = b'{"object":"embedding","index":%d,"embedding":"'


def matrix(body: Buffer, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The rows of an answer for so many inputs."""
    return np.frombuffer(body, dtype=np.float32).reshape(count, -1)


def as_base64(start: int, body: Buffer, count: int) -> bytes:
    """Elements of OpenAI's `data`, with commas between; the first has the index `start`."""
    view = memoryview(body)
    size = len(view) // count
    rows = (view[at : at + size] for at in range(0, size * count, size))
    return b",".join((_HEAD % index) + b2a_base64(row, newline=False) + b'"}' for index, row in enumerate(rows, start))


def as_numbers(start: int, body: Buffer, count: int) -> bytes:
    """The same with the vectors as arrays of numbers, each as short as it can be for a float32."""
    rows = matrix(body, count)
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows, start)]
    return orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def as_rows(start: int, body: Buffer, count: int) -> bytes:
    """Bare arrays of numbers, with commas between."""
    return orjson.dumps(matrix(body, count), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def openai_list(parts: Sequence[bytes], model: str, tokens: int) -> bytes:
    """OpenAI's answer to a request for embeddings."""
    usage = b'"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    return b"".join(
        (b'{"object":"list","data":[', b",".join(parts), b'],"model":', orjson.dumps(model), b",", usage, b"}")
    )
