"""The routes of an embedding service as OpenAPI has them; the errors are added to each by the edge."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from mdeploy.apps.embed.asked import About

_TEXT = {"type": "string", "minLength": 1}
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_USAGE = {
    "type": "object",
    "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
}
_MODEL = {"type": "string", "description": "Ours where it is not given"}
_SHARED: Mapping[str, Any] = {
    "model": _MODEL,
    "dimensions": {"type": "integer", "minimum": 1, "description": "Cut vectors to so many numbers, of norm 1 again"},
    "input_type": {
        "enum": ["query", "document", "passage", "search_query", "search_document"],
        "description": "Which side of a search the inputs are; queries get the prompt that the model was trained with",
    },
    "instruction": {"type": "string", "description": "The task of a query, in place of the usual one"},
    "prompt_name": {"type": "string", "description": "One of the model's own prompts"},
    "prompt": {"type": "string", "description": "Put before every text as it is"},
    "truncate": {
        "enum": [True, False, "END", "NONE"],
        "description": "Cut inputs that are too long; they are refused otherwise",
    },
    "truncate_prompt_tokens": {"type": "integer", "minimum": -1, "description": "Cut inputs to so many tokens"},
}
_SENTENCE = "Mount Everest is the highest mountain above sea level; its peak is on the border of Nepal and China."


def paths(about: About, handler: str) -> dict[str, Any]:
    """Every route with its schemas, and an example that a load tester can post."""
    models = {"/v1/models": _models(), "/v1/models/{name}": _one_model()}
    if about.is_cross_encoder:
        return {"/v1/rerank": _post(_rerank(about, handler)), **models}
    return {
        "/v1/embeddings": _post(_embeddings(about, handler)),
        "/embed/text": _post(_text(about)),
        "/v1/rerank": _post(_rerank(about, "")),
        **models,
    }


_MODEL_ENTRY = {
    "type": "object",
    "required": ["id", "object"],
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "max_model_len": {"type": "integer"}},
}


def _embeddings(about: About, handler: str) -> dict[str, Any]:
    given = {
        "input": {"anyOf": [_TEXT, _several(about, _TEXT)], "description": "One text or several"},
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        **_SHARED,
    }
    vector = {
        "type": "object",
        "required": ["object", "index", "embedding"],
        "properties": {
            "object": {"const": "embedding"},
            "index": {"type": "integer"},
            "embedding": {"anyOf": [_NUMBERS, {"type": "string"}]},
        },
    }
    example = {"input": _SENTENCE, "model": about.names[0], "encoding_format": "base64"}
    return {
        "summary": "Vectors of texts, as OpenAI has it",
        "operationId": "embeddings",
        "given": _object(given, "input"),
        "found": _list(vector, model={"type": "string"}, usage=_USAGE),
        "example": example,
        **_example("/v1/embeddings", handler, example),
    }


def _text(about: About) -> dict[str, Any]:
    given = {"texts": {"anyOf": [_TEXT, _several(about, _TEXT)]}, **_SHARED}
    return {
        "summary": "Vectors of texts, nothing around them",
        "operationId": "embed_text",
        "given": _object(given, "texts"),
        "found": _object({"embeddings": {"type": "array", "items": _NUMBERS}}, "embeddings"),
        "example": {"texts": [_SENTENCE]},
    }


def _rerank(about: About, handler: str) -> dict[str, Any]:
    text = {"anyOf": [_TEXT, _object({"text": _TEXT}, "text")]}
    given = {
        "query": text,
        "documents": _several(about, text),
        "top_n": {"type": "integer", "minimum": 1},
        "return_documents": {"type": "boolean", "default": False},
        "model": _MODEL,
        "instruction": _SHARED["instruction"],
        "truncate": _SHARED["truncate"],
    }
    result = {"index": {"type": "integer"}, "relevance_score": {"type": "number"}, "document": {"type": "object"}}
    found = {"results": {"type": "array", "items": _object(result, "index", "relevance_score")}, "usage": _USAGE}
    example = {"query": "How high is Mount Everest?", "documents": [_SENTENCE, "The sea is salty."]}
    return {
        "summary": "Documents in the order in which they fit a query, as Cohere and Jina have it",
        "operationId": "rerank",
        "given": _object(given, "query", "documents"),
        "found": _object(found, "results"),
        "example": example,
        **(_example("/v1/rerank", handler, example) if handler else {}),
    }


def _example(path: str, handler: str, body: Mapping[str, Any]) -> dict[str, Any]:
    encoded = base64.b64encode(json.dumps(body).encode()).decode()
    example = {"method": "POST", "path": path, "content_type": "application/json", "body_base64": encoded}
    return {"x-mdeploy-handler": handler, "x-mdeploy-example": example}


def _post(operation: dict[str, Any]) -> dict[str, Any]:
    given, found, example = (operation.pop(key) for key in ("given", "found", "example"))
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": given, "example": example}},
    }
    return {"post": {**operation, "tags": ["embed"], **_answer(found)}}


def _models() -> dict[str, Any]:
    responses = _answer(_list(_MODEL_ENTRY))
    return {"get": {"summary": "The models there are", "operationId": "models", "tags": ["models"], **responses}}


def _one_model() -> dict[str, Any]:
    responses = _answer(_MODEL_ENTRY)
    responses["responses"]["404"] = {"description": "There is no such model"}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    operation = {"summary": "One model", "operationId": "model", "tags": ["models"], "parameters": [name], **responses}
    return {"get": operation}


def _answer(schema: Mapping[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"responses": {"200": {"description": "The answer", "content": content}}}


def _list(entry: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    listed = {"object": {"const": "list"}, "data": {"type": "array", "items": entry}}
    return _object({**listed, **more}, "object", "data")


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": dict(properties)}


def _several(about: About, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "maxItems": about.max_inputs, "items": entry}
