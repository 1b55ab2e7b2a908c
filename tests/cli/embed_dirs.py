"""Model directories that the command line can read; their weights are holes in a file, however large they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

QWEN3 = {
    "architectures": ["Qwen3Model"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
BERT = {**QWEN3, "architectures": ["BertModel"], "model_type": "bert", "torch_dtype": "float32"}
CROSS = {**BERT, "architectures": ["BertForSequenceClassification"], "num_labels": 1}
GME = {**QWEN3, "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}


def make(path: Path, config: dict[str, Any], parameters: int = 1000) -> Path:
    """A directory with this configuration and so many parameters in bfloat16."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    entry = {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 2 * parameters]}
    header = json.dumps({"w": entry}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * parameters)
    return path
