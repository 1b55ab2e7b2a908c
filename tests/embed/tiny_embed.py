"""Writes tiny embedding models with the files and the structure of real ones; run where torch and transformers are.

    PYTHON tiny_embed.py DIRECTORY

Their weights are random, and larger than usual, so that attention to a wrong token shows in the vectors.
"""

import json
import os
import string
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

RANGE = 0.15
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TASK = "Given a web search query, retrieve relevant passages that answer the query"
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
WORDS = ["the", "a", "is", "of", "in", "cat", "dog", "sat", "on", "mat", "where", "what", "king", "queen", "code"]


def qwen3(path: Path) -> None:
    """Qwen3-Embedding: grouped queries, norms of query and key, the last token pooled."""
    tokenizer = _byte_level(ends_with="<|endoftext|>")
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        initializer_range=RANGE, rope_theta=1000000.0, eos_token_id=0, bos_token_id=None, pad_token_id=0,
        use_cache=True, tie_word_embeddings=True,
    )  # fmt: skip
    _save(path, Qwen3Model(config), tokenizer, architecture="Qwen3ForCausalLM")
    _modules(path, "lasttoken", 64)
    prompts = {"query": f"Instruct: {TASK}\nQuery:", "document": ""}
    _write(path / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    _write(path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072,
                                            "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})  # fmt: skip


def bert(path: Path) -> None:
    """A sentence-transformers model: mean pooling, cut at fewer tokens than it has positions."""
    tokenizer = _word_pieces()
    _save(path, BertModel(_bert(tokenizer)), tokenizer)
    _modules(path, "mean_tokens", 64)
    _write(path / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    _write(path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 160})


def cross(path: Path) -> None:
    """A cross-encoder: a pair of texts, one raw score."""
    tokenizer = _word_pieces()
    config = _bert(tokenizer)
    config.num_labels = 1
    _save(path, BertForSequenceClassification(config), tokenizer)
    _write(path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 160})


def xlmr(path: Path) -> None:
    """Like bge-m3: positions that begin after the padding's, the first token pooled."""
    tokenizer = _unigrams()
    _save(path, XLMRobertaModel(_roberta(tokenizer)), tokenizer)
    _modules(path, "cls_token", 64)
    _write(path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 160})


def cross_xlmr(path: Path) -> None:
    """Like bge-reranker: a classification head of its own, no types of tokens."""
    tokenizer = _unigrams()
    config = _roberta(tokenizer)
    config.num_labels = 1
    _save(path, XLMRobertaForSequenceClassification(config), tokenizer)
    _write(path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 160})


def gme(path: Path) -> None:
    """GME-Qwen2-VL: a vision tower of two layers in front of a small text model."""
    tokenizer = _byte_level(ends_with=None)
    ids = {token: tokenizer.token_to_id(token) for token in QWEN}
    vision = {
        "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "initializer_range": RANGE,
    }  # fmt: skip
    text = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "use_cache": True,
        "initializer_range": RANGE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=tokenizer.get_vocab_size() - 1, vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    _save(path, Qwen2VLForConditionalGeneration(config), tokenizer)
    _write(path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768,
                                            "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"})  # fmt: skip
    _write(path / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28,
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    })  # fmt: skip


def _bert(tokenizer: Tokenizer) -> BertConfig:
    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=160, type_vocab_size=2, pad_token_id=0, initializer_range=RANGE,
    )  # fmt: skip


def _roberta(tokenizer: Tokenizer) -> XLMRobertaConfig:
    return XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=162, type_vocab_size=1, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, initializer_range=RANGE,
    )  # fmt: skip


def _byte_level(ends_with: str | None) -> Tokenizer:
    """Bytes without merges, as Qwen's; its own post-processor appends `ends_with`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*QWEN, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if ends_with:
        end = [(ends_with, vocabulary[ends_with])]
        steps.append(processors.TemplateProcessing(single=f"$A {ends_with}", special_tokens=end))
    tokenizer.post_processor = processors.Sequence(steps)
    tokenizer.add_special_tokens(QWEN)
    return tokenizer


def _word_pieces() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *(word for word in WORDS if len(word) > 1)]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _unigrams() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁", *LETTERS, *string.ascii_uppercase, *(f"▁{word}" for word in WORDS)]
    scores = [(token, 0.0) for token in special] + [(piece, -3.0 / len(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _save(path: Path, model: PreTrainedModel, tokenizer: Tokenizer, architecture: str | None = None) -> None:
    model.eval().save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    if architecture:
        config = json.loads((path / "config.json").read_text())
        _write(path / "config.json", {**config, "architectures": [architecture]})


def _modules(path: Path, mode: str, dim: int) -> None:
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": place, "name": str(place), "path": where, "type": f"sentence_transformers.models.{name}"}
        for place, (where, name) in enumerate(steps)
    ]
    _write(path / "modules.json", listed)
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (path / "1_Pooling").mkdir()
    _write(path / "1_Pooling" / "config.json", {"word_embedding_dimension": dim, "include_prompt": True, **modes})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for make in (qwen3, bert, cross, xlmr, cross_xlmr, gme):
        torch.manual_seed(7)
        make(Path(sys.argv[1]) / make.__name__.replace("_", "-"))
