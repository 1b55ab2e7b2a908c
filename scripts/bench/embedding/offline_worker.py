"""One model in one process, asked over stdin. Usage: offline_worker.py KIND MODEL, run by an interpreter with torch.

KIND is ours, st-bf16, st-fp32 (sentence-transformers) or reference (plain transformers, each text alone). First it
prints a line of JSON with its settings. Each line {"way", "texts", "seconds", "file"} is answered by {"rounds",
"seconds", "cpu_s"}: all texts, strings to vectors, as often as fit; the vectors lie in the file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[str, list[str]], Any]
_REPO = Path(__file__).resolve().parents[3]
MODEL_VARIABLE, OPTIONS_VARIABLE = "MDEPLOY_MODEL_DIR", "MDEPLOY_EMBED"


def _reference(model: str) -> tuple[Encode, dict[str, Any]]:
    """Mean pooling and L2 norm, as all-MiniLM's own page has it."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def encode(_: str, texts: list[str]) -> Any:
        rows = [network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()

    return encode, {"transformers": transformers.__version__, "dtype": "float32", "batch": 1}


def _sentence_transformers(model: str, dtype: str) -> tuple[Encode, dict[str, Any]]:
    """Its documented way to go fast on a CPU: the torch backend in bfloat16, `encode` sorts by length itself."""
    import sentence_transformers  # type: ignore[import-not-found]
    import torch

    network = sentence_transformers.SentenceTransformer(
        model, device="cpu", backend="torch", model_kwargs={"dtype": {"bf16": torch.bfloat16}.get(dtype, torch.float32)}
    )

    def encode(way: str, texts: list[str]) -> Any:
        size = int(way.rpartition("-")[2])
        return network.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)

    version = sentence_transformers.__version__
    return encode, {"sentence_transformers": version, "dtype": dtype, "backend": "torch", "torch": torch.__version__}


def _ours(model: str) -> tuple[Encode, dict[str, Any]]:
    """What a worker of ours does, tokenising included, in the order of the texts or, -sorted, in that of their lengths.

    A number is a token budget, in place of what the worker measured at its start.
    """
    sys.path.append(str(_REPO))
    import tokenizers

    from mdeploy.apps.embed import rows
    from mdeploy.apps.embed.encoder import normalized

    tokenizer = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()  # that of the file is at 128 tokens, the model takes 256
    handlers = {attention: _handler(model, attention) for attention in ("packed", "padded")}
    measured = {attention: handler.encoder.budget for attention, handler in handlers.items()}

    def encode(way: str, texts: list[str]) -> Any:
        ids = [np.array(found.ids, np.int64) for found in tokenizer.encode_batch_fast(texts)]
        lengths = np.array([len(one) for one in ids])
        found = rows.Texts(lengths, np.zeros_like(lengths), np.concatenate(ids))
        attention, _, how = way.partition("-")
        encoder = handlers[attention].encoder
        encoder.budget = int(how) if how.isdigit() else measured[attention]
        batches = [found] if how == "sorted" else rows.cut(found, encoder.budget)
        return normalized(np.concatenate([encoder.encode(batch) for batch in batches]), 0)

    return encode, {attention: dict(handler.facts) for attention, handler in handlers.items()}


def _handler(model: str, attention: str) -> Any:
    from mdeploy.apps.embed.handler import Embedder

    told = {**json.loads(os.environ[OPTIONS_VARIABLE]), "attention": attention}
    os.environ.update({MODEL_VARIABLE: model, OPTIONS_VARIABLE: json.dumps(told)})
    handler = Embedder()
    handler.init("cpu")
    return handler


_KINDS: dict[str, Callable[[str], tuple[Encode, dict[str, Any]]]] = {
    "reference": _reference,
    "ours": _ours,
    "st-bf16": lambda model: _sentence_transformers(model, "bf16"),
    "st-fp32": lambda model: _sentence_transformers(model, "fp32"),
}


def main(kind: str, model: str) -> None:
    """Answer until stdin is closed."""
    answers, sys.stdout = sys.stdout, sys.stderr
    encode, settings = _KINDS[kind](model)
    print(json.dumps(settings), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        encode(asked["way"], asked["texts"][:64])
        print(json.dumps(_measured(encode, asked)), file=answers, flush=True)


def _measured(encode: Encode, asked: dict[str, Any]) -> dict[str, Any]:
    rounds, cpu, begun = 0, time.process_time(), time.perf_counter()
    while rounds == 0 or time.perf_counter() - begun < asked["seconds"]:
        vectors = encode(asked["way"], asked["texts"])
        rounds += 1
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    np.save(asked["file"], np.asarray(vectors, np.float32))
    return {"rounds": rounds, "seconds": seconds, "cpu_s": cpu_s}


if __name__ == "__main__":
    main(*sys.argv[1:])
