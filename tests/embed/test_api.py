"""What is asked is what is answered: every vector belongs to its text, whatever the form, the size and the company."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.embed.served import Rows, Service, standin
from tests.embed.standin import score, vector

TASK = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture(scope="module")
def tokenizer(embed_models: Path) -> Tokenizer:
    return Tokenizer.from_file(str(embed_models / "qwen3/tokenizer.json"))


@pytest.fixture(scope="module")
def service(embed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("api")
    names, app = ("org/tiny", "tiny"), {"workers_per_device": 2}
    with standin(place, embed_models / "qwen3", names=names, app=app, token_ids="model") as found:
        yield found


@pytest.fixture(scope="module")
def ranker(embed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with standin(tmp_path_factory.mktemp("ranker"), embed_models / "cross", env={"STANDIN_SCORES": "1"}) as found:
        yield found


def expected(tokenizer: Tokenizer, texts: list[str], dim: int = 0) -> Rows:
    return np.stack([vector(tokenizer.encode(text).ids, dim) for text in texts])


def numbers(answer: Any) -> Rows:
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


def test_numbers_and_base64_are_the_same_vectors(service: Service, tokenizer: Tokenizer) -> None:
    texts = ["the cat", "a dog that barks"]
    answer = service.post("/v1/embeddings", {"input": texts, "model": "tiny"})
    assert np.array_equal(numbers(answer), expected(tokenizer, texts))
    assert np.array_equal(service.rows(texts), expected(tokenizer, texts))
    document = answer.json()
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    assert document["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (document["object"], document["model"]) == ("list", "tiny")
    assert [(each["object"], each["index"]) for each in document["data"]] == [("embedding", 0), ("embedding", 1)]


def test_one_text_is_like_a_list_of_one(service: Service) -> None:
    one, listed = (service.post("/v1/embeddings", {"input": given}).json() for given in ("a cat", ["a cat"]))
    assert one == listed
    assert one["model"] == "org/tiny"


@pytest.mark.parametrize("dimensions", [32, 63, 64])
def test_dimensions_reach_the_model(service: Service, tokenizer: Tokenizer, dimensions: int) -> None:
    assert np.array_equal(service.rows(["a"], dimensions=dimensions), expected(tokenizer, ["a"], dimensions))


def test_a_request_of_many_batches_keeps_its_order(service: Service, tokenizer: Tokenizer) -> None:
    texts = [f"text {number} " + "word " * (number % 90) for number in range(600)]
    assert np.array_equal(service.rows(texts), expected(tokenizer, texts))


def test_everybody_gets_their_own_vectors(service: Service, tokenizer: Tokenizer) -> None:
    def ask(number: int) -> bool:
        texts = [f"client {number} text {at} " + "long " * (number * at % 50) for at in range(1 + number % 5)]
        if number % 12 == 0:
            texts *= 40  # a large request among them
        return np.array_equal(service.rows(texts), expected(tokenizer, texts))

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(200)))


PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"input_type": "document"}, ""),
    ({"input_type": "passage"}, ""),
    ({"input_type": "query"}, f"Instruct: {TASK}\nQuery:"),
    ({"input_type": "search_query"}, f"Instruct: {TASK}\nQuery:"),
    ({"prompt_name": "query"}, f"Instruct: {TASK}\nQuery:"),
    ({"prompt_name": "document"}, ""),
    ({"instruction": "Find {query} code"}, "Instruct: Find {query} code\nQuery:"),
    ({"instruction": "Find", "input_type": "query"}, "Instruct: Find\nQuery:"),
    ({"prompt": "Title: "}, "Title: "),
]


@pytest.mark.parametrize(("asked", "prompt"), PROMPTS, ids=[json.dumps(asked) for asked, _ in PROMPTS])
def test_prompts_stand_before_the_text(
    service: Service, tokenizer: Tokenizer, asked: dict[str, str], prompt: str
) -> None:
    assert np.array_equal(service.rows(["where is it"], **asked), expected(tokenizer, [prompt + "where is it"]))


def test_long_texts_are_cut_where_that_is_asked(service: Service, tokenizer: Tokenizer) -> None:
    long = "word " * 2000
    whole = tokenizer.encode(long).ids
    cases: list[tuple[dict[str, Any], int]] = [
        ({"truncate": True}, 512),
        ({"truncate": "END"}, 512),
        ({"truncate_prompt_tokens": -1}, 512),
        ({"truncate_prompt_tokens": 7}, 7),
    ]
    for asked, room in cases:
        cut = vector([*whole[: room - 1], whole[-1]])
        assert np.array_equal(service.rows([long, "a"], **asked), [cut, vector(tokenizer.encode("a").ids)])


def test_the_models_own_token_ids_are_taken_on_request(service: Service, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat").ids
    for given in (ids, [ids]):
        assert np.array_equal(service.rows(given), [vector(ids)])
    answer = service.post("/v1/embeddings", {"input": ids[:-1]})
    assert answer.status_code == 400
    assert "special tokens" in answer.json()["error"]["message"]


def test_the_plain_route_answers_in_order(service: Service, tokenizer: Tokenizer) -> None:
    texts = ["one", "two", "three"] * 40
    answer = service.post("/embed/text", {"texts": texts}).json()
    assert answer.keys() == {"embeddings"}
    assert np.array_equal(np.array(answer["embeddings"], np.float32), expected(tokenizer, texts))
    prompted = service.post("/embed/text", {"texts": "one", "prompt": "Say: "}).json()["embeddings"]
    assert np.array_equal(np.array(prompted, np.float32), expected(tokenizer, ["Say: one"]))


# ranks


def test_embedders_rank_by_cosine_of_query_and_documents(service: Service, tokenizer: Tokenizer) -> None:
    documents: list[Any] = ["the cat", {"text": "the dog"}, "a mat", "the king"]
    bare = ["the cat", "the dog", "a mat", "the king"]
    body = {"query": "who sat", "documents": documents, "return_documents": True}
    [query] = expected(tokenizer, [f"Instruct: {TASK}\nQuery:who sat"])
    scores = expected(tokenizer, bare) @ query
    answer = service.post("/v1/rerank", body).json()
    order = [each["index"] for each in answer["results"]]
    assert order == list(np.argsort(-scores))
    assert [each["document"] for each in answer["results"]] == [{"text": bare[index]} for index in order]
    assert np.allclose([each["relevance_score"] for each in answer["results"]], scores[order], atol=1e-6)
    best = service.post("/rerank", {**body, "top_n": 2, "return_documents": False}).json()["results"]
    assert [each["index"] for each in best] == order[:2]
    assert best[0].keys() == {"index", "relevance_score"}


def test_cross_encoders_score_pairs_and_answer_with_their_activation(ranker: Service, embed_models: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embed_models / "cross/tokenizer.json"))
    query, documents = "cat dog", ["king queen code", "cat", "a dog is a cat", "the mat"] * 50
    pairs = [tokenizer.encode(query, document) for document in documents]
    raw = np.array([score(pair.ids, pair.type_ids.index(1)) for pair in pairs])
    answer = ranker.post("/v1/rerank", {"query": query, "documents": documents}).json()
    found = {each["index"]: each["relevance_score"] for each in answer["results"]}
    assert np.allclose([found[index] for index in range(200)], 1 / (1 + np.exp(-raw)), atol=1e-6)
    assert [each["index"] for each in answer["results"]] == list(np.argsort(-raw, kind="stable"))
    assert answer["usage"]["total_tokens"] == sum(len(pair.ids) for pair in pairs)


# what the service says of itself


def test_health_says_what_the_model_is(service: Service) -> None:
    health = service.health()
    assert health["status"] == "ok"
    told = {"model": "org/tiny", "device": "cpu", "kind": "embedder", "dim": 64, "smallest": 32, "max_length": 512}
    assert {name: health[name] for name in told} == told
    assert (health["prompts"], health["has_query"]) == (["document", "query"], True)
    assert "path" not in health["handlers"]["embed"], "clients reach nothing there"


def test_models_are_listed_by_all_their_names(service: Service) -> None:
    listed = service.client.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["org/tiny", "tiny"]
    assert service.client.get("/v1/models/org/tiny").json() == listed["data"][0]
    assert service.client.head("/v1/models").status_code == 200


def test_the_document_has_an_example_that_can_be_posted(service: Service, ranker: Service) -> None:
    for each, path in ((service, "/v1/embeddings"), (ranker, "/v1/rerank")):
        paths = each.client.get("/openapi.json").json()["paths"]
        posts = [item["post"] for item in paths.values() if "requestBody" in item.get("post", {})]
        examples = [post["x-mdeploy-example"] for post in posts if "x-mdeploy-example" in post]
        [example] = examples
        headers = {"Content-Type": example["content_type"]}
        body = base64.b64decode(example["body_base64"])
        assert example["path"] == path
        assert each.post(path, content=body, headers=headers).status_code == 200
        assert all(post["requestBody"]["content"]["application/json"]["example"] for post in posts)


def test_inputs_and_tokens_are_counted(service: Service, tokenizer: Tokenizer) -> None:
    def counted() -> dict[str, float]:
        lines = (line.rpartition(" ") for line in service.client.get("/metrics").text.splitlines())
        return {name: float(value) for name, _, value in lines if name.startswith("mdeploy_input")}

    before = counted()
    service.rows(["the cat", "a"])
    gained = {name: value - before[name] for name, value in counted().items()}
    tokens = sum(len(tokenizer.encode(text).ids) for text in ("the cat", "a"))
    assert gained == {'mdeploy_inputs_total{handler="embed"}': 2, 'mdeploy_input_tokens_total{handler="embed"}': tokens}


def test_pieces_of_several_requests_share_batches(service: Service) -> None:
    def ask(number: int) -> None:
        service.rows(["the cat sat on the mat"] * 4)

    before = len(service.seen())
    with service.held(), ThreadPoolExecutor(24) as threads:
        asked = threads.map(ask, range(24))
        service.go_on()
        list(asked)
    batches = service.seen()[before:]
    assert sum(map(len, batches)) >= 24
    assert max(map(len, batches)) > 1
    assert all(size <= 64 for size in itertools.chain.from_iterable(batches))
