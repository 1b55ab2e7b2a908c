"""What clients of GME see beyond an embedding service of texts: pictures in every input, and as uploads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdeploy.apps.embed import fields, vectors
from mdeploy.apps.embed.api import JSON, Api
from mdeploy.apps.embed.fields import Body
from mdeploy.apps.embed.inputs import Wish
from mdeploy.apps.gme.items import Item, Upload
from mdeploy.serving import images
from mdeploy.serving.edge import Front, Route
from mdeploy.serving.exchange import Exchange
from mdeploy.serving.handler import Request

FILE = "file"
"""The field of a form that has the picture."""

_POST = frozenset({"POST"})


class GmeApi(Api):
    """The routes of one model that takes pictures."""

    def front(self) -> Front:
        """Everything there is to see."""
        front = super().front()
        routes = {"/embed/image": Route(_POST, self.image), "/embed/fused": Route(_POST, self.fused)}
        paths = {"/embed/image": _described(needs_text=False), "/embed/fused": _described(needs_text=True)}
        return Front({**front.routes, **routes}, {**front.paths, **paths}, front.health)

    async def image(self, exchange: Exchange) -> None:
        """POST /embed/image: a form with a `file`, and perhaps `text` and `instruction`; or the picture as the body."""
        await self._upload(exchange, needs_text=False)

    async def fused(self, exchange: Exchange) -> None:
        """POST /embed/fused: the same, with a text."""
        await self._upload(exchange, needs_text=True)

    async def _upload(self, exchange: Exchange, *, needs_text: bool) -> None:
        content = await self.content(exchange)
        headers = exchange.scope["headers"]
        request = Request(headers=headers, body=content.buffer, form=content.form, files=content.files)
        file = images.upload(request, FILE)
        text, instruction = request.form.get("text", ""), request.form.get("instruction")
        if needs_text and not text:
            fields.wrong("text", "is missing: POST /embed/image takes a picture alone", "empty_input")
        item = Item(text, Upload(file.buffer))
        loads = await self._inputs.prepare([item], Wish(instruction=instruction), FILE)
        parts = await self.fan.run(exchange, loads, self._about.dim({}), vectors.as_rows)
        await exchange.whole(200, JSON, b'{"embedding":' + b"".join(parts) + b"}")

    def _given(self, body: Body) -> list[Any]:
        """The inputs; `messages` in their place are one, as vLLM has it."""
        if body.get("messages") is not None and body.get("input") is None:
            return [{"messages": body["messages"]}]
        return super()._given(body)


def _described(*, needs_text: bool) -> Mapping[str, Any]:
    """A route of uploads as OpenAPI has it."""
    given = {
        "type": "object",
        "required": [FILE, "text"] if needs_text else [FILE],
        "properties": {
            FILE: {"type": "string", "format": "binary", "description": "JPEG, PNG or WEBP"},
            "text": {"type": "string", "description": "Makes one vector of both"},
            "instruction": {"type": "string"},
        },
    }
    vector = {"type": "array", "items": {"type": "number"}}
    found = {"type": "object", "required": ["embedding"], "properties": {"embedding": vector}}
    what = "a picture with a text" if needs_text else "a picture"
    return {
        "post": {
            "summary": f"The vector of {what}",
            "operationId": "embed_fused" if needs_text else "embed_image",
            "tags": ["embed"],
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": given}}},
            "responses": {
                "200": {"description": "The answer", "content": {JSON: {"schema": found}}},
                **{str(status): {"description": text} for status, text in images.RESPONSES.items()},
            },
        }
    }
