"""What clients of an embedding service see: OpenAI's API, Cohere's and Jina's for reranking, and the plain one.

It knows inputs by `inputs.Inputs` only, and the model by its files: none of it is loaded here.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mdeploy.apps.embed import described, fields, rerank, vectors
from mdeploy.apps.embed.asked import About
from mdeploy.apps.embed.fan import Fan
from mdeploy.apps.embed.fields import Body
from mdeploy.apps.embed.inputs import Inputs, Item
from mdeploy.apps.embed.rerank import Cosine, Scorer
from mdeploy.serving.backend import Backend
from mdeploy.serving.body import Content
from mdeploy.serving.edge import Front, Route, Service
from mdeploy.serving.exchange import Exchange
from mdeploy.serving.handler import HTTPError

JSON = "application/json"

_POST = frozenset({"POST"})
_GET = frozenset({"GET", "HEAD"})


class Api:
    """The routes of one model. `backend` has its workers, `scorer` is how it ranks: by cosine where it is None."""

    def __init__(
        self, service: Service, backend: Backend, about: About, inputs: Inputs, scorer: Scorer | None = None
    ) -> None:
        self._service, self._backend, self._about, self._inputs = service, backend, about, inputs
        self._scorer = scorer or Cosine(about, inputs)
        self.fan = Fan(backend, inputs, service.metrics.registry)

    def front(self) -> Front:
        """Everything there is to see."""
        add = self._service.add_api_route
        add("/v1/models/{name:path}", self._model, methods=["GET", "HEAD"], include_in_schema=False)
        routes = {
            "/v1/embeddings": Route(_POST, self.embeddings),
            "/v1/rerank": Route(_POST, self.rerank),
            "/rerank": Route(_POST, self.rerank),
            "/v1/models": Route(_GET, self.models),
            "/embed/text": Route(_POST, self.text),
        }
        return Front(routes, described.paths(self._about, self._backend.info.name), self.health)

    # vectors

    async def embeddings(self, exchange: Exchange) -> None:
        """POST /v1/embeddings."""
        body = await self.body(exchange)
        about = self._about
        model = about.name(body)
        self._needs_vectors()
        form = fields.choice(body, "encoding_format", ("float", "base64")) or "float"
        write = vectors.as_base64 if form == "base64" else vectors.as_numbers
        parts, tokens = await self._embed(exchange, body, self._given(body), "input", write)
        await exchange.whole(200, JSON, vectors.openai_list(parts, model, tokens))

    async def text(self, exchange: Exchange) -> None:
        """POST /embed/text."""
        body = await self.body(exchange)
        self._needs_vectors()
        self._about.name(body)
        texts = body.get("texts")
        values = [texts] if isinstance(texts, str) else fields.several(body, "texts", self._about.max_inputs)
        parts, _ = await self._embed(exchange, body, values, "texts", vectors.as_rows)
        await exchange.whole(200, JSON, b'{"embeddings":[' + b",".join(parts) + b"]}")

    async def body(self, exchange: Exchange) -> dict[str, Any]:
        """The JSON of a request, whose task ends when the client leaves. Raises HTTPError, ClientLeftError."""
        return fields.document((await self.content(exchange)).buffer)

    async def content(self, exchange: Exchange) -> Content:
        """What a request sent; from then on its task ends when the client leaves. Raises as `body` does."""
        content = await self._service.read(exchange)
        task = asyncio.current_task()
        assert task is not None
        exchange.on_leave(functools.partial(_end, task))
        return content

    async def _embed(
        self, exchange: Exchange, body: Body, values: Sequence[Any], param: str, write: vectors.Write
    ) -> tuple[list[bytes], int]:
        """The vectors as JSON, piece by piece, and the number of tokens."""
        dim, wish = self._about.dim(body), self._about.wish(body)
        self.fan.expect(values)
        loads = await self._inputs.prepare(self._parsed(values, param), wish, param)
        parts = await self.fan.run(exchange, loads, dim, write)
        return parts, sum(map(self._inputs.tokens, loads))

    def _given(self, body: Body) -> list[Any]:
        """The inputs: one, an array of them, or one that is an array of token ids."""
        value = body.get("input")
        if value is None:
            fields.wrong("input", "is null" if "input" in body else "is missing", "missing_input")
        if not isinstance(value, list) or (value and type(value[0]) is int):
            return [value]
        return fields.counted(value, "input", self._about.max_inputs)

    def _parsed(self, values: Sequence[Any], param: str) -> list[Item]:
        parse = self._inputs.parse
        if len(values) == 1:
            return [parse(values[0], param)]
        return [parse(value, f"{param}[{index}]") for index, value in enumerate(values)]

    def _needs_vectors(self) -> None:
        if self._about.is_cross_encoder:
            text = f"{self._about.names[0]} scores pairs of texts and has no embeddings: use POST /v1/rerank"
            raise HTTPError(400, text, code="no_embeddings", param="model")

    # ranks

    async def rerank(self, exchange: Exchange) -> None:
        """POST /v1/rerank, /rerank."""
        body = await self.body(exchange)
        await exchange.whole(200, JSON, await rerank.answer(exchange, self.fan, self._about, self._scorer, body))

    # what there is

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models."""
        data = [self._described(name) for name in self._about.names]
        await exchange.whole(200, JSON, fields.dumps({"object": "list", "data": data}))

    async def _model(self, name: str) -> dict[str, Any]:
        self._about.check_name(name)
        return self._described(name)

    def _described(self, name: str) -> dict[str, Any]:
        about = self._about
        return {
            "id": name,
            "object": "model",
            "created": about.since,
            "owned_by": "mdeploy",
            "root": about.names[0],
            "max_model_len": about.max_length,
        }

    def health(self) -> Mapping[str, Any]:
        """What /health says of the model."""
        checkpoint, facts = self._about.checkpoint, self._backend.info.facts
        workers = self._backend.workers()
        return {
            "device": workers[0].device if workers else None,
            "dtype": checkpoint.dtype,
            **facts,
            "model": self._about.names[0],
            "kind": checkpoint.kind,
            "dim": self._about.dimensions or checkpoint.dim,
            "smallest": checkpoint.smallest,
            "max_length": self._about.max_length,
            **self._inputs.health(),
        }


def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
