"""What is wrong with a request is said, with the status OpenAI's clients know, and the service goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.embed.served import Service, standin

LIMIT = 8 << 20
TOO_LONG = "context_length_exceeded"


@pytest.fixture(scope="module")
def service(embed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("battery")
    with standin(place, embed_models / "qwen3", app={"max_body_bytes": LIMIT}) as found:
        yield found


@pytest.fixture(scope="module")
def ranker(embed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with standin(tmp_path_factory.mktemp("ranker"), embed_models / "cross", env={"STANDIN_SCORES": "1"}) as found:
        yield found


def refused(answer: Any, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape, after a look at what it says."""
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert document.keys() == {"error"}
    error: dict[str, Any] = document["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == {404: "not_found_error"}.get(status, "invalid_request_error")
    assert code is None or error["code"] == code
    assert error["param"] == param
    return error


NO_JSON = {
    "nothing": b"",
    "half an object": b'{"input": "a"',
    "a form": b"input=a",
    "an array": b'["a"]',
    "a string": b'"a"',
    "null": b"null",
    "NaN": b'{"input": NaN}',
    "infinity": b'{"input": -Infinity}',
    "a deep nest": b"[" * 100_000,
    "a deep nest in an object": b'{"input":' * 5_000,
    "an escaped lone surrogate": b'{"input": "\\ud800"}',
    "a reversed pair": b'{"input": "\\udc00\\ud800"}',
    "a raw lone surrogate": b'{"input": "\xed\xa0\x80"}',
    "Latin-1": '{"input": "ü"}'.encode("latin-1"),
    "UTF-16": '{"input": "a"}'.encode("utf-16"),
    "a raw line break": b'{"input": "a\nb"}',
    "a trailing comma": b'{"input": "a",}',
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_object_is_400(service: Service, body: bytes) -> None:
    for path in ("/v1/embeddings", "/v1/rerank", "/embed/text"):
        answer = service.post(path, content=body, headers={"Content-Type": "application/json"})
        refused(answer, 400, "invalid_json")


INPUTS: list[tuple[Any, str, str]] = [
    (None, "missing_input", "input"),
    (True, "invalid_type", "input"),
    (1, "invalid_type", "input"),
    (1.5, "invalid_type", "input"),
    ({}, "invalid_type", "input"),
    ({"text": 1}, "invalid_type", "input"),
    ({"image": "data:image/png;base64,AAAA"}, "invalid_type", "input"),
    ({"text": "a", "image": "b"}, "invalid_type", "input"),
    ("", "empty_input", "input"),
    ([], "empty_input", "input"),
    ([""], "empty_input", "input"),
    (["a", ""], "empty_input", "input[1]"),
    ([[]], "empty_input", "input"),
    ([None], "invalid_type", "input"),
    (["a", None], "invalid_type", "input[1]"),
    (["a", 1], "invalid_type", "input[1]"),
    ([1, "a"], "invalid_type", "input"),
    ([1.5], "invalid_type", "input"),
    ([True], "invalid_type", "input"),
    ([[1.5]], "invalid_type", "input"),
    ([[True]], "invalid_type", "input"),
    ([["a"]], "invalid_type", "input"),
    ([[[1]]], "invalid_type", "input"),
    (["a", ["b"]], "invalid_type", "input[1]"),
    ([1, 2, 3], "token_ids_not_supported", "input"),
    ([[1, 2], [3]], "token_ids_not_supported", "input[0]"),
    (["a"] * 3000, "too_many_inputs", "input"),
    ("word " * 1000, TOO_LONG, "input"),
    (["a", "word " * 1000], TOO_LONG, "input[1]"),
    ("a" * 6_000_000, TOO_LONG, "input"),
]


@pytest.mark.parametrize(("given", "code", "param"), INPUTS, ids=[json.dumps(each[0])[:30] for each in INPUTS])
def test_inputs_that_are_none_are_400(service: Service, given: Any, code: str, param: str) -> None:
    refused(service.post("/v1/embeddings", {"input": given}), 400, code, param)


def test_a_missing_input_is_400(service: Service) -> None:
    refused(service.post("/v1/embeddings", {"model": "tiny"}), 400, "missing_input", "input")


def test_token_ids_are_refused_with_what_langchain_users_need_to_know(service: Service) -> None:
    error = refused(service.post("/v1/embeddings", {"input": [[9906, 1917]]}), 400, None, "input")
    assert "check_embedding_ctx_length=False" in error["message"]
    assert "--token-ids model" in error["message"]


Fields = tuple[dict[str, Any], str]


def each(name: str, *values: Any, **others: Any) -> list[Fields]:
    """A body for each of the values of one field."""
    return [({**others, name: value}, name) for value in values]


FIELDS: list[Fields] = [
    *each("model", 1, True, [], {}),
    *each("encoding_format", "hex", "", 1, ["float"], False),
    *each("dimensions", 0, -1, 31, 65, 10**30, 1.5, 64.0, "64", True, [64], {}),
    *each("input_type", "other", 1, []),
    *each("prompt_name", "nope", "", 1),
    *each("truncate", "START", 1, 0, [], {}, "true"),
    *each("truncate_prompt_tokens", 0, -2, 513, 1.5, -1.0, "9", True),
    ({"prompt": 1}, "prompt"),
    ({"instruction": 1}, "instruction"),
    ({"prompt": "a", "prompt_name": "query"}, "prompt_name"),
    ({"prompt": "a", "instruction": "b"}, "instruction"),
    ({"input_type": "query", "prompt_name": "query"}, "prompt_name"),
    ({"input_type": "document", "instruction": "b"}, "instruction"),
]


@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=[json.dumps(each[0])[:50] for each in FIELDS])
def test_other_fields_are_checked_and_named(service: Service, fields: dict[str, Any], param: str) -> None:
    refused(service.post("/v1/embeddings", {"input": "word " * 1000, **fields}), 400, None, param)


def test_an_unknown_prompt_lists_the_known(service: Service) -> None:
    error = refused(service.post("/v1/embeddings", {"input": "a", "prompt_name": "x"}), 400, None, "prompt_name")
    assert "document, query" in error["message"]


def test_a_number_that_json_cannot_hold_is_400(service: Service) -> None:
    body = b'{"input": "a", "dimensions": 1e999}'
    assert service.post("/v1/embeddings", content=body).status_code == 400


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank"])
def test_another_model_is_404(service: Service, path: str) -> None:
    body = {"input": "a", "query": "a", "documents": ["b"], "model": "text-embedding-3-small"}
    error = refused(service.post(path, body), 404, "model_not_found", "model")
    assert "tiny" in error["message"]
    assert service.client.get("/v1/models/text-embedding-3-small").status_code == 404


ODD: tuple[Any, ...] = ("", None, 1, ["b"], {}, {"text": 1})
RERANK: list[Fields] = [
    ({}, "query"),
    ({"documents": ["a"]}, "query"),
    ({"query": "q"}, "documents"),
    *each("query", None, "", 1, ["q"], {}, {"text": 1}, documents=["a"]),
    *each("documents", None, "a", [], {}, 1, ["a"] * 3000, query="q"),
    *(({"query": "q", "documents": ["a", value]}, "documents[1]") for value in ODD),
    *each("top_n", 0, -1, "1", 1.0, True, query="q", documents=["a"]),
    ({"query": "q", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
    ({"query": "q", "documents": ["a", "word " * 1000]}, "documents[1]"),
]


@pytest.mark.parametrize(("body", "param"), RERANK, ids=[json.dumps(each[0])[:50] for each in RERANK])
def test_rerank_checks_as_well_whatever_ranks(
    service: Service, ranker: Service, body: dict[str, Any], param: str
) -> None:
    for each in (service, ranker):
        answer = each.post("/v1/rerank", body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].partition("[")[0] == param.partition("[")[0]


TEXT: list[Fields] = [
    ({}, "texts"),
    *each("texts", None, "", [], 1, {}, [1], [""], ["a"] * 3000),
    ({"texts": ["a"], "prompt": 1}, "prompt"),
    ({"texts": ["a"], "dimensions": 7}, "dimensions"),
]


@pytest.mark.parametrize(("body", "param"), TEXT, ids=[json.dumps(each[0])[:50] for each in TEXT])
def test_the_plain_route_has_the_same_errors(service: Service, body: dict[str, Any], param: str) -> None:
    refused(service.post("/embed/text", body), 400, None, param)


def test_a_cross_encoder_has_no_embeddings(ranker: Service) -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/embed/text", {"texts": ["a"]})):
        error = refused(ranker.post(path, body), 400, "no_embeddings", "model")
        assert "/v1/rerank" in error["message"]


def test_a_cross_encoder_takes_no_prompts(ranker: Service) -> None:
    for name in ("prompt", "prompt_name", "instruction"):
        refused(ranker.post("/v1/rerank", {"query": "q", "documents": ["a"], name: "query"}), 400, None, name)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_405(service: Service, method: str) -> None:
    answer = service.client.request(method, "/v1/embeddings")
    refused(answer, 405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


def test_forms_are_no_json(service: Service) -> None:
    error = refused(service.post("/v1/embeddings", files={"input": b"a"}), 400, "invalid_json")
    assert "application/json" in error["message"]


def test_json_is_read_whatever_its_content_type(service: Service) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
        answer = service.post("/v1/embeddings", content=b'{"input": "a"}', headers={"Content-Type": kind})
        assert answer.status_code == 200


def test_100_mb_are_refused_while_they_come(service: Service) -> None:
    port = int(service.url.rpartition(":")[2])
    for head in (b"Content-Length: 100000000", b"Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: t\r\n" + head + b"\r\n\r\n")
            if b"chunked" in head:
                _send_until_refused(sock, b"100000\r\n" + b"a" * (1 << 20) + b"\r\n", LIMIT >> 20)
            assert sock.recv(12) == b"HTTP/1.1 413"


def _send_until_refused(sock: socket.socket, chunk: bytes, enough: int) -> None:
    for _ in range(enough + 1):
        sock.sendall(chunk)


def test_what_only_looks_odd_is_taken(service: Service) -> None:
    odd = ["\x00", "a\x00b", " ", "\n", "\u202e\u0000\ufeff", "<|endoftext|>", "e\u0301", "\U0010ffff"]
    assert service.rows(odd).shape == (8, 64)
    escaped = service.post("/v1/embeddings", content=b'{"input": "\\ud83c\\udf89"}').json()
    assert escaped["data"] == service.post("/v1/embeddings", {"input": "\U0001f389"}).json()["data"]
    more = {"user": "u", "dimensions": None, "model": None, "encoding_format": None, "extra": {"a": [1]}}
    assert service.post("/v1/embeddings", {"input": {"text": "a"}, **more}).status_code == 200


def test_2048_inputs_are_taken(service: Service) -> None:
    rows = service.rows([f"text {number}" for number in range(2048)])
    assert rows.shape == (2048, 64)


def test_after_all_that_it_serves(service: Service, ranker: Service) -> None:
    for each in (service, ranker):
        health = each.health()
        assert health["status"] == "ok"
        assert health["handlers"]["embed"]["in_flight"] == health["handlers"]["embed"]["queued"] == 0
        assert "Traceback" not in each.log
