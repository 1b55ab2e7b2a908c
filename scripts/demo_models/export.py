"""Writes a directory that transformers, vLLM and the ModelScope SDK read as a Qwen2 chat model.

The JSON is written by hand, not by `save_pretrained`, so that the same bytes suit old and new
releases: transformers 5 renamed `torch_dtype` to `dtype` but still reads the old key, which
transformers 4 and vLLM need. Knows nothing of the FAQ's content beyond what it is handed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END)
MAX_POSITIONS = 2048
VOCABULARY = 1024
"""Byte-level BPE: 256 bytes, 3 specials, the rest merges; a multiple of 64 as GPUs prefer."""

INITIAL_SPREAD = 0.08
"""About 1/sqrt(hidden), four times Qwen2's: every layer then carries signal from the start,
so that a shuffled tensor cannot go unseen (see verify.survivors)."""

DEFAULT_SYSTEM = "You are the demo model of mdeploy."
CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] != 'system' %}"
    f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n"
    "{% endif %}"
    "{% for message in messages %}"
    f"{IM_START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{IM_END}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{IM_START}assistant\n"
    "{% endif %}"
)
"""ChatML as Qwen2 uses it (https://qwen.readthedocs.io, "Control Tokens & Chat Template")."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture. head_dim = hidden / heads = 32, the least vLLM's CPU attention takes."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE made for these texts; any other text still encodes, byte by byte.

    It splits words exactly as Qwen2 does: transformers 5 rebuilds the tokenizer of every
    model of type qwen2 with Qwen2's splitting, whatever tokenizer.json says, while
    transformers 4 and the Rust tokenizers obey the file. So the two must agree.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """config.json; `vocabulary` is the embedding's row count."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "initializer_range": INITIAL_SPREAD,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.layers,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": SPECIALS.index(IM_END),
        "pad_token_id": SPECIALS.index(END_OF_TEXT),
        "torch_dtype": "float32",
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json: top_k 1 keeps vLLM greedy even when a client asks temperature 0.7.

    vLLM ignores `do_sample` and starts from temperature 1.0 when neither the request nor this
    file says otherwise; of the keys it reads, top_k=1 alone means greedy at any temperature.
    transformers reads `do_sample: true` with top_k=1 as the same thing, without the warning
    that top_k beside `do_sample: false` draws.
    """
    return {
        "do_sample": True,
        "top_k": 1,
        "eos_token_id": [SPECIALS.index(IM_END), SPECIALS.index(END_OF_TEXT)],
        "pad_token_id": SPECIALS.index(END_OF_TEXT),
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json, with the class name that Qwen2's own models carry."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": MAX_POSITIONS,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(index): _added(text) for index, text in enumerate(SPECIALS)},
        "chat_template": CHAT_TEMPLATE,
    }


def _added(text: str) -> dict[str, object]:
    """One special token as tokenizer_config.json spells it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text, **flags}


def special_tokens_map() -> dict[str, Any]:
    """special_tokens_map.json, which transformers 4 prefers to tokenizer_config.json."""
    return {"eos_token": IM_END, "pad_token": END_OF_TEXT, "additional_special_tokens": [IM_START, IM_END]}


def write_json(path: Path, value: object) -> None:
    """Readable JSON with a final newline, so that a diff of two trainings stays small."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_side_files(directory: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Everything but the weights and the model's own documents."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in (
        ("config.json", dict(config)),
        ("generation_config.json", generation_config()),
        ("tokenizer_config.json", tokenizer_config()),
        ("special_tokens_map.json", special_tokens_map()),
        ("configuration.json", {"framework": "pytorch", "task": "text-generation"}),
    ):
        write_json(directory / name, value)
