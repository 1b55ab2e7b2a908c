"""Clients that people have, as they are, against a real model: OpenAI's, LangChain's, and a key that is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings

from tests.embed.served import Rows, Service, served

KEY = "sk-test-embed-123456789"
SET = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
]


@pytest.fixture(scope="module")
def service(minilm: Path, torch_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("clients")
    keys = place / "keys"
    keys.write_text(KEY + "\n")
    env = {"MDEPLOY_API_KEYS_FILE": str(keys)}
    options = {"names": ("all-MiniLM-L6-v2", "text-embedding-3-small"), "dtype": "float32", "batch_tokens": 1024}
    with served(place, minilm, python=torch_python, env=env, **options) as found:  # type: ignore[arg-type]
        found.client.headers["Authorization"] = f"Bearer {KEY}"
        yield found


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def cosine(left: Rows, right: Rows) -> float:
    return float(np.min(np.sum(left * right, axis=-1)))


def test_openai_gets_the_same_vectors_in_both_forms(service: Service, client: openai.OpenAI) -> None:
    usual = client.embeddings.create(model="all-MiniLM-L6-v2", input=SET)  # asks for base64
    floats = client.embeddings.create(model="all-MiniLM-L6-v2", input=SET, encoding_format="float")
    rows = np.array([each.embedding for each in usual.data], np.float32)
    assert [each.index for each in usual.data] == [0, 1, 2, 3]
    assert np.allclose(rows, [each.embedding for each in floats.data], atol=1e-6)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert usual.usage.total_tokens == floats.usage.total_tokens > 20
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    assert rows[2] @ rows[3] > 0.5 > rows[1] @ rows[3]


def test_the_same_text_has_the_same_vector_in_any_company(service: Service) -> None:
    alone = np.concatenate([service.rows(text) for text in SET])
    mates = [f"mate {number} " + "of another length " * (number % 7) for number in range(20)]
    together = service.rows([*mates, *SET, *mates])[20:24]
    assert cosine(alone, together) > 0.9999


def test_openais_asynchronous_client_asks_many_at_once(service: Service) -> None:
    async def ask() -> Rows:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
            asked = (client.embeddings.create(model="text-embedding-3-small", input=text) for text in SET * 4)
            return np.array([answer.data[0].embedding for answer in await asyncio.gather(*asked)], np.float32)

    assert cosine(asyncio.run(ask()), np.tile(service.rows(SET), (4, 1))) > 0.9999


def test_openais_client_raises_its_own_errors(service: Service, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not trained to be cut") as wrong:
        client.embeddings.create(model="all-MiniLM-L6-v2", input="a", dimensions=128)
    assert wrong.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError, match="all-MiniLM-L6-v2") as unknown:
        client.embeddings.create(model="text-embedding-ada-002", input="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="at most 256") as long:
        client.embeddings.create(model="all-MiniLM-L6-v2", input="word " * 300)
    assert long.value.code == "context_length_exceeded"
    cut = client.embeddings.create(model="all-MiniLM-L6-v2", input="word " * 300, extra_body={"truncate": True})
    assert cut.usage.prompt_tokens == 256
    assert [model.id for model in client.models.list()] == ["all-MiniLM-L6-v2", "text-embedding-3-small"]


def test_a_wrong_key_and_none_are_401(service: Service) -> None:
    stranger = openai.OpenAI(base_url=f"{service.url}/v1", api_key="sk-wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.embeddings.create(model="all-MiniLM-L6-v2", input="a")
    assert refused.value.code == "invalid_api_key"
    for path in ("/v1/embeddings", "/v1/rerank", "/embed/text", "/v1/models"):
        method = "GET" if path == "/v1/models" else "POST"
        answer = httpx.request(method, service.url + path, json={"input": "a"}, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken would fetch OpenAI's; this one has a token for each byte."""
    ranks = {bytes([number]): number for number in range(256)}
    own = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: own)


def test_langchain_is_told_what_to_set(service: Service, encoding: None) -> None:
    usual = OpenAIEmbeddings(model="text-embedding-3-small", base_url=f"{service.url}/v1", api_key=KEY)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        usual.embed_query("the cat sat on the mat")


def test_langchain_works_once_it_is_set(service: Service) -> None:
    client = OpenAIEmbeddings(
        model="text-embedding-3-small",
        base_url=f"{service.url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    assert cosine(np.array(client.embed_documents(SET), np.float32), service.rows(SET)) > 0.9999
    assert cosine(np.array([client.embed_query(SET[0])], np.float32), service.rows(SET[:1])) > 0.9999


def test_reranking_puts_the_meant_document_first(service: Service) -> None:
    answer = service.post("/v1/rerank", {"query": "falling share prices", "documents": SET, "top_n": 2}).json()
    assert {each["index"] for each in answer["results"]} == {2, 3}
