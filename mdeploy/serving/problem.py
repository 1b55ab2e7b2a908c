"""Which errors a client hears of, and the one shape they have: OpenAI's. Nothing but the standard library."""

from __future__ import annotations

import json
import math

from mdeploy.serving.backend import OverloadedError
from mdeploy.serving.handler import HTTPError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    414: "uri_too_long",
    415: "unsupported_media_type",
    422: "invalid_input",
    429: "rate_limited",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}


def document(status: int, message: str, code: str = "", param: str | None = None) -> bytes:
    """The JSON body of an error. `code` is one of its own where the status says too little."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status, kind)}
    return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")


def known(error: BaseException) -> HTTPError | None:
    """What is told to the client of an exception; None where it is nobody's business."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, OverloadedError):
        after = str(max(1, math.ceil(error.retry_after_s)))
        return HTTPError(503, str(error), code="overloaded", headers={"Retry-After": after})
    return None
