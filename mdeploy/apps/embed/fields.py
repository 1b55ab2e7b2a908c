"""Fields of a JSON body, checked by hand: a schema library takes five times as long on many token ids.

Every function raises HTTPError 400 that names the field; `null` is the same as a field that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import orjson

from mdeploy.serving.handler import Buffer, HTTPError

Body = Mapping[str, Any]

_SHOWN = 40
_KINDS: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}


def document(buffer: Buffer) -> dict[str, Any]:
    """A body that is a JSON object. What is no Unicode (lone surrogates) is refused with the rest."""
    if not buffer:
        text = "the body is empty: send a JSON object with Content-Type: application/json"
        raise HTTPError(400, text, code="invalid_json")
    try:
        body = orjson.loads(buffer)
    except ValueError as error:
        raise HTTPError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise HTTPError(400, f"the body is {kind(body)}, a JSON object is expected", code="invalid_json")
    return body


def wrong(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    """Refuse a request because of one of its fields."""
    raise HTTPError(400, f"{param} {message}", code=code, param=param)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:_SHOWN]}"
    return _KINDS[type(value)]


def text(body: Body, name: str) -> str | None:
    """A string."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        wrong(name, f"is {kind(value)}, a string is expected", "invalid_type")
    return value


def flag(body: Body, name: str) -> bool | None:
    """A truth value."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        wrong(name, f"is {kind(value)}, true or false is expected", "invalid_type")
    return value


def whole(body: Body, name: str, least: int = 1) -> int | None:
    """A whole number, `least` or more."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        wrong(name, f"is {kind(value)}, a whole number is expected", "invalid_type")
    if value < least:
        wrong(name, f"is {value}, it must be {least} or more")
    return value


def choice(body: Body, name: str, choices: Sequence[str]) -> str | None:
    """One of a few words."""
    value = text(body, name)
    if value is not None and value not in choices:
        wrong(name, f"is {value[:_SHOWN]!r}, it may be {', '.join(choices)}")
    return value


def several(body: Body, name: str, most: int) -> list[Any]:
    """An array that must be there, with 1 to `most` elements, whatever they are."""
    value = body.get(name)
    if not isinstance(value, list):
        wrong(name, "is missing" if name not in body else f"is {kind(value)}, an array is expected", "invalid_type")
    return counted(value, name, most)


def counted(values: list[Any], name: str, most: int) -> list[Any]:
    """The same array where it has 1 to `most` elements."""
    if not values:
        wrong(name, "is an empty array: send at least one", "empty_input")
    if len(values) > most:
        wrong(name, f"has {len(values)} elements, at most {most} are taken in one request", "too_many_inputs")
    return values


def dumps(value: Any) -> bytes:
    """JSON of an answer; numbers may be numpy's."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
