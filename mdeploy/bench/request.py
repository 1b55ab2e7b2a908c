"""One plain HTTP request, asked again and again: what a load on an app, or on any server, is made of.

It comes from the user, or from the example that an app shows in its own /openapi.json. Nothing is sent here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mdeploy.errors import ConfigError, NotFoundError, UsageError

JSON = "application/json"
_EXAMPLE = "x-mdeploy-example"
_LARGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A request without its server. `path` has the query; `body` is sent as it is, always the same."""

    path: str
    method: str = "POST"
    content_type: str = JSON
    body: bytes = field(default=b"", repr=False)

    @property
    def digest(self) -> str:
        """What tells this request from another one."""
        words = f"{self.method} {self.path} {self.content_type}\n".encode()
        return hashlib.sha256(words + self.body).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a user says of the request; what is left out comes from the server's example."""

    path: str | None = None
    body: bytes | None = field(default=None, repr=False)
    content_type: str | None = None


def asked(path: str | None, data: str | None, files: Sequence[str], content_type: str | None) -> Ask | None:
    """The words of a command line as a request; None where they say nothing. Raises UsageError or ConfigError.

    `data` is a body or @FILE, `files` are FIELD=@FILE or FIELD=text of a multipart form.
    """
    if path is not None:
        _check_path(path)
    if files and data is not None:
        raise UsageError("--data and --file exclude each other", hint="a form field is --file NAME=value")
    if files:
        kind, body = multipart([_part(word) for word in files])
        return Ask(path, body, content_type or kind)
    if data is None:
        return Ask(path, None, content_type) if path or content_type else None
    is_file = data.startswith("@")
    body = _read(data[1:]) if is_file else data.encode()
    return Ask(path, body, content_type or (_type_of(data[1:]) if is_file else JSON))


def _check_path(path: str) -> None:
    if not path.startswith("/") or not path.isascii() or any(char <= " " for char in path):
        raise UsageError(f"--path {path!r} is no path", hint="it begins with / and is percent-encoded, like /v1/x?a=b")


def _part(word: str) -> tuple[str, str, str, bytes]:
    """Field, file name (empty for text), media type and content."""
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise UsageError(f"--file {word}: FIELD=@FILE, or FIELD=text")
    if not value.startswith("@"):
        return name, "", "", value.encode()
    return name, Path(value[1:]).name, _type_of(value[1:]), _read(value[1:])


def _type_of(path: str) -> str:
    return mimetypes.guess_type(path)[0] or "application/octet-stream"


def _read(path: str) -> bytes:
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > _LARGEST:
            raise UsageError(f"{path} has more than 1 GiB")
        return file.read_bytes()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def multipart(parts: Sequence[tuple[str, str, str, bytes]]) -> tuple[str, bytes]:
    """A form as its media type and body (RFC 7578); the boundary depends on the content and does not stand in it."""
    digest = hashlib.sha256(b"\0".join(content for *_, content in parts)).hexdigest()
    boundary = f"mdeploy-{digest[:32]}"
    lines: list[bytes] = []
    for name, file, kind, content in parts:
        disposition = f'form-data; name="{_quoted(name)}"' + (f'; filename="{_quoted(file)}"' if file else "")
        head = [f"--{boundary}", f"Content-Disposition: {disposition}", *([f"Content-Type: {kind}"] if kind else [])]
        lines += ["\r\n".join(head).encode(), b"", content]
    return f"multipart/form-data; boundary={boundary}", b"\r\n".join([*lines, f"--{boundary}--".encode(), b""])


def _quoted(text: str) -> str:
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


# examples


def complete(ask: Ask, document: Mapping[str, Any] | None) -> BenchRequest:
    """The request to send: the user's, completed by the example of the path or of the only handler that has one.

    `document` is the server's /openapi.json, None where it has none. Raises NotFoundError without an example where
    one is needed, UsageError where there are several.
    """
    if ask.path is not None and ask.body is not None:
        return BenchRequest(ask.path, "POST", ask.content_type or JSON, ask.body)
    found = dict(_examples(document or {}))
    path = ask.path or _only(found)
    example = found.get(urlsplit(path).path)
    if ask.body is not None:
        return BenchRequest(path, "POST", ask.content_type or JSON, ask.body)
    if example is None:
        known = f"examples are there for {', '.join(found)}" if found else "--data BODY or --file FIELD=@FILE gives one"
        raise NotFoundError(f"the server shows no example for {path}", hint=known)
    if "?" in path:
        return BenchRequest(path, example.method, ask.content_type or example.content_type, example.body)
    return example


def _only(found: Mapping[str, BenchRequest]) -> str:
    if not found:
        hint = "--path /PATH --data BODY, or give the handler an `example`"
        raise NotFoundError("the server shows no example of a request", hint=hint)
    if len(found) > 1:
        raise UsageError(f"the server has several handlers: {', '.join(found)}", hint=f"--path {next(iter(found))}")
    return next(iter(found))


def _examples(document: Mapping[str, Any]) -> Iterator[tuple[str, BenchRequest]]:
    """Each handler once, at the first of its paths that has an example; aliases only where they are asked for."""
    seen: set[str] = set()
    for path, item in (document.get("paths") or {}).items():
        for operation in item.values() if isinstance(item, dict) else ():
            example = operation.get(_EXAMPLE) if isinstance(operation, dict) else None
            if isinstance(example, dict) and operation.get("x-mdeploy-handler") not in seen:
                seen.add(str(operation.get("x-mdeploy-handler")))
                yield path, _decoded(path, example)


def _decoded(path: str, example: Mapping[str, Any]) -> BenchRequest:
    try:
        body = base64.b64decode(example.get("body_base64") or "", validate=True)
    except binascii.Error as error:
        raise ConfigError(f"the example of {path} is no base64", hint="--data gives another body") from error
    query = example.get("query") or ""
    method, kind = str(example.get("method") or "POST"), str(example.get("content_type") or JSON)
    return BenchRequest(f"{path}?{query}" if query else path, method, kind, body)
