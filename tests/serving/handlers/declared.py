"""Classes that say what they take and what they answer, for checks that read /openapi.json."""
# ruff: noqa: RUF012 as users write it

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mdeploy.serving.handler import Handler, HTTPError, Request

TEXT = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 200},
        "times": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["text"],
    "additionalProperties": False,
}


class Repeat(Handler):
    """Repeats a text."""

    body = TEXT
    result = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    responses = {409: "the text is `taken`"}
    example = {"text": "a", "times": 2}
    max_batch_size = 8
    methods = ("POST",)

    def forward(self, batch: list[Any]) -> list[Any]:
        return [HTTPError(409, "taken") if item["text"] == "taken" else self._repeated(item) for item in batch]

    def _repeated(self, item: Any) -> Any:
        return {"text": item["text"] * int(item.get("times", 1))}


class Anything(Handler):
    """Says what kind of JSON it got; all kinds are welcome."""

    body = {}

    def inference(self, request: Request) -> Any:
        return {"kind": type(request.json()).__name__}


class Words(Handler):
    """A stream of the words of a text."""

    body = TEXT
    methods = ("POST",)

    def inference(self, request: Request) -> Iterator[str]:
        yield from request.json()["text"].split()


class Count(Handler):
    """Counts the bytes of a body. It declares none, and takes all."""

    def inference(self, request: Request) -> Any:
        return {"bytes": len(request.body), "files": len(request.files)}
