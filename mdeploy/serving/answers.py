"""From what a handler returned or raised to the reply that is sent. Nothing but the standard library is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from mdeploy.serving.handler import HTTPError, Response
from mdeploy.serving.info import Reply

_JSON = "application/json"
_BODILESS = (204, 205, 304)
_FRAMING = ("content-length", "transfer-encoding", "connection", "content-type", "date", "server")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110
_PRINTABLE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_DEVICE_LOST = re.compile(
    r"device-side assert|illegal (memory access|instruction|address)|misaligned address|unspecified launch failure"
    r"|uncorrectable ECC|invalid program counter"
)
_CODES = {400: "bad_request", 404: "not_found", 413: "too_large", 415: "unsupported_media_type", 422: "invalid_body"}


class DeviceLostError(Exception):
    """This process cannot use its GPU any more, only a fresh one can: CUDA refuses everything that follows."""


def _encoder() -> Callable[[Any], bytes]:
    """The quickest JSON there is in this interpreter; both write NaN and infinity as null."""
    try:
        import orjson
    except ImportError:
        return lambda value: json.dumps(
            _finite(value), default=lambda v: _finite(_plain(v)), ensure_ascii=False
        ).encode()
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return lambda value: orjson.dumps(value, default=_plain, option=options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """What models return as JSON knows it: arrays, tensors and scalars, dataclasses, pydantic's objects, sets."""
    for name in ("model_dump", "tolist", "item"):
        convert = getattr(value, name, None)
        if callable(convert):
            return convert()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


encode = _encoder()
"""Any value a handler may return as JSON. Raises TypeError for what has none."""


def reply_of(result: Any) -> Reply:
    """The reply for a value, a Response, or bytes. Raises TypeError for a value without JSON."""
    if isinstance(result, Response):
        body, usual = _content(result.content)
        status, media_type = _status(result.status), _sound("media type", result.media_type or usual)
        return Reply(status, media_type, b"" if status in _BODILESS else body, _headers(result.headers))
    body, usual = _content(result) if _is_raw(result) else (encode(result), _JSON)
    return Reply(200, usual, body)


def _status(status: Any) -> int:
    if not isinstance(status, int) or not 200 <= status <= 599:
        raise ValueError(f"status {status!r} of a Response: a number from 200 to 599")
    return int(status)


def _headers(headers: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Headers as they may be sent; what frames the message is the server's business."""
    pairs = ((_sound("header name", name), _sound("header", str(value))) for name, value in headers.items())
    return tuple(pair for pair in pairs if pair[0].lower() not in _FRAMING)


def _sound(what: str, text: str) -> str:
    """Text that cannot end a header line early. Raises ValueError."""
    if (
        not isinstance(text, str)
        or not _PRINTABLE.fullmatch(text)
        or (what == "header name" and not _NAME.fullmatch(text))
    ):
        raise ValueError(f"{what} {text!r} of a Response cannot be sent")
    return text


def _content(content: Any) -> tuple[Any, str]:
    if _is_raw(content):
        return _flat(content), "application/octet-stream"
    return (content.encode(), "text/plain; charset=utf-8") if isinstance(content, str) else (encode(content), _JSON)


def _flat(content: Any) -> Any:
    """Bytes in a row: a view may be of numbers, have several dimensions, or leave some out."""
    if not isinstance(content, memoryview):
        return content
    return content.cast("B") if content.c_contiguous else content.tobytes()


def _is_raw(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview))


def failed(error: BaseException, errors: Mapping[type[BaseException], int], *, blames_client: bool = False) -> Reply:
    """The reply for an exception; one that is nobody's business is 500, with its traceback in the log.

    `blames_client` where a ValueError is about what the client sent. Raises DeviceLostError.
    """
    if has_lost_device(error):
        raise DeviceLostError(str(error).partition("\n")[0]) from error
    known = next((status for kind, status in errors.items() if isinstance(error, kind)), None)
    if isinstance(error, HTTPError):
        return refusal(error.status, error.message, error.code, _headers_that_can_be_sent(error))
    if known is not None:
        return refusal(known, str(error))
    if isinstance(status := getattr(error, "status_code", None), int) and 400 <= status <= 599:
        return refusal(status, str(getattr(error, "detail", error)))  # FastAPI's and Starlette's HTTPException
    if isinstance(error, TimeoutError):
        return refusal(504, "the model ran out of time", "timeout")
    if blames_client and isinstance(error, ValueError):
        return refusal(400, str(error))
    if is_out_of_memory(error):
        return refusal(500, "this request alone takes more memory than the device has", "out_of_memory")
    report(error)
    return refusal(500, "the model failed at this request; the service's log says why", "internal_error")


def _headers_that_can_be_sent(error: HTTPError) -> tuple[tuple[str, str], ...]:
    try:
        return _headers(error.headers)
    except ValueError as wrong:
        report(wrong)
        return ()


def refusal(status: int, message: str, code: str | None = None, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    """An error; the edge gives it its shape. Plain values only: it cannot read those of a user's own classes."""
    return Reply(int(status), _JSON, b"", headers, str(code or _CODES.get(status, "error")), str(message))


def report(error: BaseException) -> None:
    """A traceback to the log, in one piece."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    with contextlib.suppress(OSError):  # the log's disk may be full: that is no reason to answer nobody
        sys.stderr.write(text)
        sys.stderr.flush()


def has_lost_device(error: BaseException) -> bool:
    """Whether CUDA will fail from now on whatever it is asked; torch and onnxruntime say it in words only."""
    kind = type(error).__name__
    return (isinstance(error, RuntimeError) or "Fail" in kind) and bool(_DEVICE_LOST.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: torch has its own class for it, others say it in words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
