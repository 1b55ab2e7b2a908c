"""How the worker's class answers, through the runner that asks it in a service: run where torch is, prints JSON.

PYTHON handler_script.py MODELS DIRECTORY
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mdeploy.apps.embed import work
from mdeploy.apps.embed.handler import Embedder
from mdeploy.serving import load
from mdeploy.serving.handler import Request
from mdeploy.serving.load import LoadError
from mdeploy.serving.runner import Answered, Runner
from mdeploy.serving.worker import warm_up


def started(model: Path, **settings: Any) -> tuple[Runner, Any]:
    os.environ["MDEPLOY_MODEL_DIR"] = str(model)
    os.environ["MDEPLOY_EMBED"] = json.dumps({"dtype": "float32", "batch_tokens": 256, **settings})
    handler = Embedder()
    handler.init("cpu")
    info = load.measured(load.describe(Embedder, {}, {}), handler)
    runner = Runner(handler, info)
    warm_up(runner, info)
    return runner, info


def ask(runner: Runner, *bodies: bytes) -> list[dict[str, Any]]:
    replies: dict[int, Any] = {}
    for event in runner.run([Request(body=body) for body in bodies]):
        assert isinstance(event, Answered)
        replies |= dict(event.replies)
    return [
        {"status": reply.status, "code": reply.code, "message": reply.message, "vectors": len(reply.body) // 4}
        | {"numbers": np.frombuffer(reply.body, np.float32).astype(float).tolist()}
        for _, reply in sorted(replies.items())
    ]


def pack(*texts: list[int], dim: int = 0) -> bytes:
    return work.pack(map(work.Tokens, texts), dim)


def spoiled(model: Path, to: Path, change: Any) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def broken_at_120(weights: dict[str, torch.Tensor]) -> None:
    weights["embeddings.position_embeddings.weight"][120] = float("nan")


def broken(weights: dict[str, torch.Tensor]) -> None:
    weights["embeddings.LayerNorm.weight"][:] = float("nan")


def without_a_layer(weights: dict[str, torch.Tensor]) -> None:
    del weights["encoder.layer.1.output.dense.weight"]


def of_other_sizes(weights: dict[str, torch.Tensor]) -> None:
    name = "embeddings.word_embeddings.weight"
    weights[name] = weights[name][:-3].clone()


def answers(models: Path) -> dict[str, Any]:
    runner, info = started(models / "qwen3")
    texts = [[7, 8, 9, 0], [11, 0], [*range(20, 60), 0]]
    return {
        "facts": dict(info.facts),
        "budget": info.max_batch_cost,
        "whole": ask(runner, pack(*texts))[0],
        "batch": ask(runner, pack(texts[0]), pack(*texts[1:], dim=32), pack(texts[0], texts[0])),
        "bad": ask(
            runner, pack([7, 262]), pack([5] * 513), pack([7], dim=65), b"abc", pack([7, 8, 9, 0])
        ),
    }  # fmt: skip


def refused(model: Path, **settings: Any) -> str:
    try:
        started(model, **settings)
    except LoadError as error:
        return str(error)
    return "none"


def main(models: Path, place: Path) -> None:
    runner, _ = started(spoiled(models / "bert", place / "nan", broken_at_120))
    bad = ask(runner, pack([2, 8, 3]), pack([2, 8, 3], [9] * 125), pack([2, 10, 3]))
    endless = Path(shutil.copytree(models / "qwen3", place / "endless"))
    tokenizer = json.loads((endless / "tokenizer.json").read_text())
    (endless / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    scores, info = started(models / "cross", attention="padded", max_length=50)
    told = {
        **answers(models),
        "no number": bad,
        "endless": refused(endless),
        "lost weights": refused(spoiled(models / "bert", place / "lost", without_a_layer)),
        "other sizes": refused(spoiled(models / "bert", place / "sizes", of_other_sizes)),
        "broken": refused(spoiled(models / "bert", place / "broken", broken)),
        "no model": refused(place / "nothing"),
        "no dtype": refused(models / "bert", dtype="int3"),
        "scores": ask(scores, work.pack([work.Tokens([2, 8, 3, 9, 3], 3), work.Tokens([2, 8, 3, 10, 3], 3)])),
        "too long": ask(scores, pack([5] * 51)),
        "scores' facts": dict(info.facts),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
