"""Token ids are what the model's own tokenizer makes of a text, whole, cut and in pairs."""

import asyncio
import itertools
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.inputs import Wish
from mdeploy.apps.embed.prompts import Prompts
from mdeploy.apps.embed.texts import Texts
from mdeploy.serving.handler import HTTPError

MODELS = ("qwen3", "bert", "xlmr")
WORDS = ["the", "cat", "sat", "king", "queen", "antidisestablishment", "猫", "ünï", "🎉", "\x00", "don't", "12345", "!"]
PLAIN = Checkpoint(Path("/m"), "embedder", "X", "mean", dim=8, max_length=512, weight_bytes=1)


def texts_of(path: Path, max_length: int = 512, **more: Any) -> Texts:
    return Texts(path / "tokenizer.json", Prompts(PLAIN), max_length, **more)


def own(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def some(count: int, seed: int = 1, words: int = 60) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, words))) for _ in range(count)]


def prepared(texts: Texts, items: list[Any], wish: Wish | None = None) -> list[list[int]]:
    return [list(each.ids) for each in asyncio.run(texts.prepare(items, wish or Wish(), "input"))]


@pytest.mark.parametrize("model", MODELS)
def test_many_texts_are_encoded_as_each_alone(embed_models: Path, model: str) -> None:
    texts, tokenizer = texts_of(embed_models / model), own(embed_models / model)
    items = some(1500)  # several slices in threads
    assert prepared(texts, items) == [tokenizer.encode(item).ids for item in items]
    assert prepared(texts, items[:1]) == [tokenizer.encode(items[0]).ids]  # in the event loop


@pytest.mark.parametrize("model", MODELS)
def test_cut_texts_keep_their_special_tokens(embed_models: Path, model: str) -> None:
    texts, tokenizer = texts_of(embed_models / model), own(embed_models / model)
    for room in (3, 4, 17, 64):
        tokenizer.enable_truncation(room)
        items = some(20, seed=room)
        assert prepared(texts, items, Wish(room=room)) == [tokenizer.encode(item).ids for item in items]


@pytest.mark.parametrize("model", ["cross", "cross-xlmr"])
def test_pairs_are_cut_as_transformers_cuts_them(embed_models: Path, model: str) -> None:
    texts, tokenizer = texts_of(embed_models / model), own(embed_models / model)
    for room, seed in itertools.product((8, 9, 31, 512), (1, 2)):
        tokenizer.enable_truncation(room, strategy="longest_first")
        query, *documents = some(7, seed=room + seed, words=25)
        found = asyncio.run(texts.pairs(query, documents, Wish(room=room), "documents"))
        expected = [tokenizer.encode(query, document) for document in documents]
        assert [list(each.ids) for each in found] == [each.ids for each in expected]
        types = [[0] * (t.second or len(t.ids)) + [1] * (len(t.ids) - t.second if t.second else 0) for t in found]
        assert types == [each.type_ids for each in expected]


def test_the_tokenizers_own_padding_and_truncation_are_off(minilm: Path) -> None:
    texts = texts_of(minilm)
    short, long = prepared(texts, ["cat", "cat " * 300])
    assert (len(short), len(long)) == (3, 302)


@pytest.mark.parametrize("wish", [Wish(), Wish(prompt="cat " * 10)])
def test_a_long_text_is_refused_by_its_tokens_prompt_and_all(embed_models: Path, wish: Wish) -> None:
    texts = texts_of(embed_models / "bert", max_length=16)
    with pytest.raises(HTTPError, match="tokens, this model takes at most 16") as refused:
        prepared(texts, ["cat", "cat " * (15 if wish.prompt is None else 6)], wish)
    assert (refused.value.param, refused.value.code) == ("input[1]", "context_length_exceeded")


def test_a_huge_text_is_refused_unread_and_cut_unread(embed_models: Path) -> None:
    texts = texts_of(embed_models / "bert", max_length=16)
    huge = "cat " * 25_000_000
    with pytest.raises(HTTPError, match="100000000 characters") as refused:
        prepared(texts, [huge])
    assert refused.value.code == "context_length_exceeded"
    assert prepared(texts, [huge], Wish(room=16)) == prepared(texts, ["cat " * 14])


def test_a_prompt_does_not_fill_the_memory_by_being_put_before_every_text(embed_models: Path) -> None:
    texts = texts_of(embed_models / "bert", max_length=16)
    tracemalloc.start()
    try:
        with pytest.raises(HTTPError, match="60000 characters goes with each of 2048"):
            prepared(texts, ["cat"] * 2048, Wish(prompt="cat " * 15_000))
        prepared(texts, ["cat"] * 8, Wish(prompt="cat " * 500_000, room=16))
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_token_ids_must_be_whole_texts_of_the_model(embed_models: Path) -> None:
    path = embed_models / "qwen3"
    texts, ids = texts_of(path, token_ids="model"), own(path).encode("the cat").ids
    assert prepared(texts, [texts.parse(ids, "input")]) == [ids]
    for wrong, why in ((ids[:-1], "special tokens"), ([*ids[:-1], 10**6], "none of the model's"), ([-1], "none of")):
        with pytest.raises(HTTPError, match=why):
            texts.parse(wrong, "input")
    with pytest.raises(HTTPError, match="together with texts"):
        prepared(texts, [texts.parse(ids, "input"), "text"])
    with pytest.raises(HTTPError, match="together with a prompt"):
        prepared(texts, [texts.parse(ids, "input")], Wish(prompt="x"))
