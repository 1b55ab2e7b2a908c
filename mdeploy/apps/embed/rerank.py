"""Documents by how well they fit a query: a cross-encoder reads both at once, embedders compare their vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdeploy.apps.embed import fields, vectors
from mdeploy.apps.embed.asked import About
from mdeploy.apps.embed.fan import Fan
from mdeploy.apps.embed.fields import Body
from mdeploy.apps.embed.inputs import Inputs, Wish
from mdeploy.apps.embed.texts import Texts
from mdeploy.serving.exchange import Exchange
from mdeploy.serving.handler import Buffer

Scores = NDArray[np.float32]


class Scorer(Protocol):
    """How one model ranks."""

    async def scores(
        self, exchange: Exchange, fan: Fan, query: Any, documents: Sequence[Any], wish: Wish
    ) -> tuple[Scores, int]:
        """One score for each document, the higher the better, and the number of tokens. Raises HTTPError."""


class Cosine:
    """Of the query's vector with each document's: -1 to 1. The query gets the prompt for queries."""

    def __init__(self, about: About, inputs: Inputs) -> None:
        self._about, self._inputs = about, inputs

    async def scores(
        self, exchange: Exchange, fan: Fan, query: Any, documents: Sequence[Any], wish: Wish
    ) -> tuple[Scores, int]:
        """See `Scorer`."""
        inputs, count = self._inputs, len(documents)
        asked = [inputs.parse(query, "query")]
        items = [inputs.parse(each, f"documents[{index}]") for index, each in enumerate(documents)]
        has_prompt = wish.prompt is not None or wish.prompt_name is not None
        for_query = wish if has_prompt else dataclasses.replace(wish, kind="query")
        loads = [
            *await inputs.prepare(asked, for_query, "query"),
            *await inputs.prepare(items, Wish(kind="document", room=wish.room), "documents"),
        ]
        rows = np.concatenate(await fan.run(exchange, loads, self._about.dimensions or 0, _rows))
        assert len(rows) == count + 1
        return rows[1:] @ rows[0], sum(map(inputs.tokens, loads))


class Pairs:
    """By a cross-encoder: what its activation makes of the raw scores, mostly 0 to 1."""

    def __init__(self, about: About, texts: Texts) -> None:
        self._about, self._texts = about, texts

    async def scores(
        self, exchange: Exchange, fan: Fan, query: Any, documents: Sequence[Any], wish: Wish
    ) -> tuple[Scores, int]:
        """See `Scorer`."""
        texts = self._texts
        for name in ("prompt", "prompt_name", "instruction"):
            if getattr(wish, name) is not None:
                fields.wrong(name, "is not supported: a cross-encoder reads the bare texts")
        asked = texts.text(query, "query")
        items = [texts.text(each, f"documents[{index}]") for index, each in enumerate(documents)]
        loads = await texts.pairs(asked, items, wish, "documents")
        raw = np.concatenate(await fan.run(exchange, loads, 0, _scores))
        if self._about.checkpoint.activation == "sigmoid":
            raw = 1 / (1 + np.exp(-raw.clip(-80, 80)))  # float32 has no exp(89)
        return raw, sum(map(texts.tokens, loads))


async def answer(exchange: Exchange, fan: Fan, about: About, scorer: Scorer, body: Body) -> bytes:
    """Cohere's and Jina's answer. Raises HTTPError."""
    model = about.name(body)
    query = body.get("query")
    if query is None:
        fields.wrong("query", "is null" if "query" in body else "is missing", "missing_input")
    documents = fields.several(body, "documents", about.max_inputs)
    top = fields.whole(body, "top_n") or len(documents)
    shows = fields.flag(body, "return_documents") or False
    scores, tokens = await scorer.scores(exchange, fan, query, documents, about.wish(body))
    results = [
        _result(int(index), scores[index], documents[index] if shows else None)
        for index in np.argsort(-scores, kind="stable")[:top]
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return fields.dumps({"id": exchange.id, "object": "list", "model": model, "results": results, "usage": usage})


def _result(index: int, score: np.float32, document: Any) -> dict[str, Any]:
    result = {"index": index, "relevance_score": score}
    if document is not None:
        result["document"] = {"text": document} if isinstance(document, str) else document
    return result


def _rows(start: int, body: Buffer, count: int) -> Scores:
    return vectors.matrix(body, count)


def _scores(start: int, body: Buffer, count: int) -> Scores:
    return vectors.matrix(body, count)[:, 0]
