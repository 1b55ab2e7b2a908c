"""What the encoder makes of texts, beside plain transformers: run where torch is, prints one JSON object.

PYTHON encoder_script.py MODELS MINILM
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from mdeploy.apps.embed import attention, calibration, checkpoint, forward, linear, loading, rows, selfcheck
from mdeploy.apps.embed.encoder import Encoder, normalized
from mdeploy.apps.embed.forward import Padded, Transformer
from mdeploy.apps.embed.handler import _compile
from mdeploy.apps.embed.heads import Head
from mdeploy.serving.load import LoadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = [31, 3, 64, 64, 2, 120, 17, 3, 90, 5]
PARAPHRASES = [
    ("How do I reset my password?", "What are the steps to change a forgotten password?"),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    (
        "The central bank raised interest rates.",
        "Borrowing got more expensive after the monetary authority's decision.",
    ),
    ("She runs ten kilometres every morning.", "Her daily routine starts with a 10 km jog."),
    ("The server crashed because it ran out of memory.", "An out-of-memory error took the machine down."),
    ("Heavy rain flooded the old town.", "The historic centre was under water after the storm."),
]


def random_texts(found: checkpoint.Checkpoint) -> rows.Texts:
    lengths = np.minimum(np.array(LENGTHS), found.max_length)
    pairs = found.kind == "cross-encoder"
    ids = np.random.default_rng(3).integers(5, found.vocabulary, int(lengths.sum()))
    return rows.Texts(lengths, lengths // 2 if pairs else np.zeros_like(lengths), ids)


def alone(path: Path, found: checkpoint.Checkpoint, dtype: torch.dtype, texts: rows.Texts) -> Any:
    """Plain transformers, one text at a time, pooled here."""
    is_cross = found.kind == "cross-encoder"
    auto = transformers.AutoModelForSequenceClassification if is_cross else transformers.AutoModel
    model = auto.from_pretrained(path, dtype=dtype).eval()
    results = []
    for one in rows.cut(texts, 0):
        told = {"input_ids": torch.from_numpy(one.ids)[None]}
        if is_cross and found.model_type == "bert":
            told["token_type_ids"] = (torch.arange(one.tokens) >= int(one.seconds[0])).long()[None]
        output = model(**told)
        if is_cross:
            results.append(output.logits[0])
            continue
        hidden = output.last_hidden_state[0].float()
        results.append({"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[found.pooling])
    return torch.stack(results).float().numpy()


def left_padded(path: Path, texts: rows.Texts) -> Any:
    """As people often ask a decoder: padded at the left, the last place pooled."""
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    longest = int(texts.lengths.max())
    ids, mask = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(2))
    for place, one in enumerate(rows.cut(texts, 0)):
        ids[place, longest - one.tokens :], mask[place, longest - one.tokens :] = torch.from_numpy(one.ids), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, -1].numpy()


def transformer(found: checkpoint.Checkpoint, dtype: torch.dtype) -> Transformer:
    model = loading.load(found, "cpu", dtype)
    head = Head(model) if found.kind == "cross-encoder" else None
    return Transformer(model, head.pooling if head else found.pooling, head)


def closeness(got: Any, expected: Any, is_cross: bool) -> float:
    """The least cosine; for scores 1 - the largest difference."""
    if is_cross:
        return 1 - float(np.abs(got - expected).max())
    return float((normalized(got, 0) * normalized(expected, 0)).sum(1).min())


def one_model(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    found = checkpoint.read(path)
    texts, is_cross = random_texts(found), found.kind == "cross-encoder"
    expected = alone(path, found, dtype, texts)
    model = transformer(found, dtype)
    packed = selfcheck.chosen(model, found, "auto")
    encoder = Encoder(packed, 10_000)
    got = {"packed": encoder.encode(texts), "repeated": encoder.encode(texts)}
    encoder.budget = 70
    got["in small rows"] = encoder.encode(texts)
    got["one by one"] = np.concatenate([encoder.encode(one) for one in rows.cut(texts, 0)])
    selfcheck._set(model, "sdpa")
    got["padded"] = Encoder(selfcheck.chosen(model, found, "padded"), 300).encode(texts)
    if found.pooling == "last" and not is_cross:
        got["left-padded"] = left_padded(path, texts)
    close = {name: closeness(value, expected, is_cross) for name, value in got.items()}
    prepacked = any(type(layer).__name__ == "_Linear" for layer in model.model.modules())
    return {
        "attention": packed.name,
        "prepacked": prepacked,
        "close": close,
        "types": sorted({str(value.dtype) for value in got.values()}),
    }


class Sabotaged:
    """Attention that forgets where texts end."""

    def __enter__(self) -> None:
        self._kept = attention.attend

        def attend(query: Any, key: Any, value: Any, *rest: Any) -> Any:
            with attention.packed(attention.Segments([query.shape[0]])):
                return self._kept(query, key, value, *rest)

        attention.attend = attend  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        attention.attend = self._kept


def sabotage(path: Path) -> dict[str, Any]:
    """Which way is chosen where packing, or every batch, goes wrong."""
    found = checkpoint.read(path)
    told: dict[str, Any] = {}
    with Sabotaged():
        model = transformer(found, torch.float32)
        way = selfcheck.chosen(model, found, "auto")
        told["auto"] = way.name
        texts = random_texts(found)
        told["close"] = closeness(Encoder(way, 500).encode(texts), alone(path, found, torch.float32, texts), False)
        told["packed"] = refusal(lambda: selfcheck.chosen(transformer(found, torch.float32), found, "packed"))
        model, plain = transformer(found, torch.float32), Padded.pooled
        Padded.pooled = lambda self, texts: plain(self, texts).roll(1, 0)  # type: ignore[method-assign]
        told["neither"] = refusal(lambda: selfcheck.chosen(model, found, "auto"))
        Padded.pooled = plain  # type: ignore[method-assign]
    return told


def refusal(do: Any) -> str:
    try:
        do()
    except LoadError as error:
        return str(error)
    return "none"


def windows() -> dict[str, Any]:
    """Models whose tokens see only those near them, asked with texts longer than that."""
    size = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "initializer_range": 0.2}
    mistral = transformers.MistralConfig(**size, **heads, num_key_value_heads=2, head_dim=16, sliding_window=8)
    modern = transformers.ModernBertConfig(
        **size, **heads, local_attention=16, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
        bos_token_id=1, eos_token_id=2, reference_compile=False,
    )  # fmt: skip
    both = {"causal": (transformers.MistralModel, mistral), "both ways": (transformers.ModernBertModel, modern)}
    told = {}
    for name, (cls, config) in both.items():
        torch.manual_seed(1)
        model = Transformer(cls(config).eval(), "last")
        found = checkpoint.Checkpoint(Path(name), "embedder", cls.__name__, "last", 64, 256, 0, vocabulary=99)
        texts = random_texts(found)
        expected = forward.Single(model).pooled(texts).numpy()
        way = selfcheck.chosen(model, found, "auto")
        told[name] = [way.name, closeness(Encoder(way, 200).encode(texts), expected, False)]
    return told


def families() -> dict[str, Any]:
    """Models that differ in places, types of tokens or heads: which way is chosen, and how close it is."""
    size = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2}
    ends = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    grouped = {"num_key_value_heads": 2, "head_dim": 32}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 1}
    judged = {"num_labels": 1, "classifier_pooling": "mean", "local_attention": 16}
    both_ways = {"sliding_window": 16, "use_bidirectional_attention": True, "pad_token_id": 0}
    t = transformers
    models = {
        "mpnet": (t.MPNetModel, t.MPNetConfig(**size, **heads, pad_token_id=1)),
        "gpt2": (t.GPT2Model, t.GPT2Config(vocab_size=99, **gpt2)),
        "gemma": (t.Gemma3TextModel, t.Gemma3TextConfig(**size, **heads, **grouped, **both_ways)),
        "judge": (t.ModernBertForSequenceClassification, t.ModernBertConfig(**size, **heads, **ends, **judged)),
        "decoder": (t.Qwen3ForSequenceClassification, t.Qwen3Config(**size, **heads, **grouped, num_labels=1)),
    }
    told: dict[str, Any] = {name: family(*model) for name, model in models.items()}
    told["wrong head"] = refusal(lambda: family(*models["judge"], torch.bfloat16, "cls"))
    t5 = t.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)
    told["no encoder"] = refusal(lambda: family(t.T5Model, t5))
    return told


def written_padding(path: Path) -> list[float]:
    """A user may write the token that padding is made of, and it is not counted."""
    found = checkpoint.read(path)
    texts = random_texts(found)
    texts.ids[[2, 40, 41, 200]] = 1
    model = transformer(found, torch.float32)
    got = [Encoder(selfcheck.chosen(model, found, way), 200).encode(texts) for way in ("padded", "packed")]
    return [closeness(each, alone(path, found, torch.float32, texts), False) for each in got]


def family(cls: Any, config: Any, dtype: torch.dtype = torch.float32, pooling: Any = None) -> list[Any]:
    torch.manual_seed(1)
    plain = cls(copy.deepcopy(config)).eval().to(dtype)
    head = Head(plain) if hasattr(plain, "num_labels") and "Classification" in cls.__name__ else None
    model = Transformer(plain, pooling or (head.pooling if head else "mean"), head)
    kind: Any = "cross-encoder" if head else "embedder"
    found = checkpoint.Checkpoint(Path(cls.__name__), kind, cls.__name__, "mean", 64, 200, 0, vocabulary=99)
    alike = Transformer(copy.deepcopy(plain), model.pooling, Head(copy.deepcopy(plain)) if head else None)
    way, texts = selfcheck.chosen(model, found, "auto"), random_texts(found)
    return [way.name, closeness(Encoder(way, 200).encode(texts), forward.Single(alike)(texts).numpy(), bool(head))]


def deep() -> dict[str, float]:
    """The cosine that is asked for in half precision, by how far copies of a text are from the text alone."""
    alone = torch.tensor([[1.0, 0.0]])

    def least(angle: float) -> float:
        copies = torch.tensor([[np.cos(angle), np.sin(angle)]])
        return selfcheck.least(torch.bfloat16, lambda count: copies, alone)

    return {"quiet": least(0.0), "noisy": least(0.04), "broken": least(1.0), "none": least(np.nan)}


def wrong_layers(path: Path) -> dict[str, Any]:
    """Prepacked layers that compute something else."""
    found, plain = checkpoint.read(path), linear._Linear.forward
    linear._Linear.forward = lambda self, given: plain(self, given).roll(1, -1)  # type: ignore[method-assign]
    one = one_model(path, torch.bfloat16)
    linear._Linear.forward = lambda self, given: plain(self, given.reshape(7))  # type: ignore[method-assign]
    other = transformer(found, torch.bfloat16)
    way = selfcheck.chosen(other, found, "auto")
    linear._Linear.forward = plain  # type: ignore[method-assign]
    return {"wrong": one, "broken": way.name}


class Small:
    """A device with room for so many tokens."""

    name = "packed"

    def __init__(self, forward: forward.Forward, room: int) -> None:
        self._forward, self._room, self.asked = forward, room, list[int]()

    def pooled(self, texts: rows.Texts) -> torch.Tensor:
        return self._forward.pooled(texts)

    def __call__(self, texts: rows.Texts) -> torch.Tensor:
        if texts.tokens > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.asked.append(texts.tokens)
        return self._forward(texts)


def memory(path: Path) -> dict[str, Any]:
    found = checkpoint.read(path)
    packed = selfcheck.chosen(transformer(found, torch.float32), found, "packed")
    texts = random_texts(found)
    small = Small(packed, 130)
    got = Encoder(small, 10_000).encode(texts)
    told: dict[str, Any] = {
        "close": closeness(got, Encoder(packed, 10_000).encode(texts), False),
        "largest": max(small.asked),
    }
    try:
        Encoder(Small(packed, 100), 10_000).encode(texts)
    except torch.OutOfMemoryError as error:
        told["too small"] = str(error)
    return told


def budgets() -> dict[str, Any]:
    """What is found on devices of known speed: seconds of a batch as a function of its tokens."""

    def found(seconds: Any, patience: float = 1000.0, room: float = 1e9) -> int:
        now = 0.0

        def ask(texts: rows.Texts, budget: int) -> None:
            nonlocal now
            if min(texts.tokens, budget) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            now += sum(seconds(row.tokens) for row in rows.cut(texts, budget))

        return calibration.calibrate(ask, calibration.CPU_BUDGETS, 256, patience, lambda: now).budget

    told: dict[str, Any] = {
        "flat": found(lambda tokens: tokens / 1000),
        "flat and quick": found(lambda tokens: tokens / 30_000),
        "costly batches": found(lambda tokens: 1.0 + tokens / 1000),
        "large ones are slow": found(lambda tokens: 0.3 + tokens / (1000 if tokens <= 2048 else 500)),
        "little memory": found(lambda tokens: 1.0 + tokens / 1000, room=3000),
        "little patience": found(lambda tokens: 1.0 + tokens / 1000, patience=8),
    }
    try:
        found(lambda tokens: 1.0, room=100)
    except torch.OutOfMemoryError as error:
        told["no memory"] = str(error)
    usual = calibration.usual(1024, 100)
    return {**told, "usual": [usual.tokens, int(usual.lengths.max()), int(usual.lengths.min())]}


def compiled(path: Path) -> dict[str, Any]:
    """The graph that torch.compile makes of a packed model: in one piece, for rows of any length."""
    found = checkpoint.read(path)
    model = transformer(found, torch.float32)
    encoder = Encoder(selfcheck.chosen(model, found, "packed"), 10_000)
    texts, graphs = random_texts(found), list[int]()

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph

    plain = encoder.encode(texts)
    base, model.base = model.base, torch.compile(model.base, dynamic=True, fullgraph=True, backend=count)
    got = [encoder.encode(texts), encoder.encode(rows.taken(texts, np.arange(4)))]
    close = [closeness(one, plain[: len(one)], False) for one in got]
    model.base = base
    _compile(model, encoder.forward, texts, "eager")
    right, model.base = model.base, base
    _compile(model, encoder.forward, texts, lambda graph, inputs: lambda *given: [one + 1 for one in graph(*given)])
    kept = {"right": right is not base, "wrong": model.base is not base}
    return {"close": min(close), "graphs": len(graphs), "kept": kept}


def minilm(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    found = checkpoint.read(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    words = [tokenizer.encode(text).ids for pair in zip(*PARAPHRASES, strict=True) for text in pair]
    lengths = np.array([len(ids) for ids in words])
    texts = rows.Texts(lengths, np.zeros_like(lengths), np.concatenate(words).astype(np.int64))
    encoder = Encoder(selfcheck.chosen(transformer(found, dtype), found, "auto"), 100)
    vectors = normalized(encoder.encode(texts), 0)
    left, right = np.split(vectors, 2)
    return {
        "attention": encoder.forward.name,
        "nearest": (left @ right.T).argmax(1).tolist(),
        "close": closeness(vectors, alone(path, found, dtype, texts), False),
        "short": float(np.linalg.norm(normalized(vectors, 64), axis=1).min()),
    }


def main(models: Path, mini: Path) -> None:
    with torch.inference_mode():
        names = ("qwen3", "bert", "xlmr", "cross", "cross-xlmr")
        told: dict[str, Any] = {
            f"{name} {kind}": one_model(models / name, dtype) for name in names for kind, dtype in DTYPES.items()
        }
        told |= {f"minilm {kind}": minilm(mini, dtype) for kind, dtype in DTYPES.items()}
        told |= {"sabotage": sabotage(models / "bert"), "memory": memory(models / "qwen3"), "budgets": budgets()}
        told["huge"] = normalized(np.full((1, 4), 1e30, np.float32), 0).tolist()
        told["windows"] = windows()
        told |= {"families": families(), "deep": deep(), "written padding": written_padding(models / "xlmr")}
        told["wrong layers"] = wrong_layers(models / "bert")
        told["compiled"] = compiled(models / "qwen3")
    print(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
