"""Writes tiny but working checkpoints of Flan-T5 and BLIP: run by an interpreter that has torch and transformers.

    PYTHON tiny_torch.py DIRECTORY

They have the files and the structure of the real ones, and were taught a few words for a few seconds, so that a
caption that belongs to another picture shows.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BlipConfig, BlipForConditionalGeneration, T5Config, T5ForConditionalGeneration

from tests.examples.tiny_words import COLOURS, NUMBERS, TASK

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 64


def t5(path: Path) -> None:
    """A Flan-T5 (gated GELU, untied head) that knows a few numbers in German."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    corpus = [TASK + word for word in NUMBERS] + list(NUMBERS.values())
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    asked = tokenizer.encode_batch([TASK + word for word in NUMBERS])
    told = torch.tensor([one.ids for one in tokenizer.encode_batch(list(NUMBERS.values()))])
    batch = {
        "input_ids": torch.tensor([one.ids for one in asked]),
        "attention_mask": torch.tensor([one.attention_mask for one in asked]),
        "labels": told.masked_fill(told == 0, -100),
    }
    _teach(model, lambda: model(**batch).loss, 0.005)
    tokenizer.no_padding()
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **names})


def blip(path: Path) -> None:
    """A BLIP that knows colours; as in the real one its start token is none of the tokenizer's."""
    torch.manual_seed(0)
    words = [*COLOURS, "a", "picture", "of", "photo", "colour"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    start = len(vocabulary)
    text = {
        "vocab_size": start + 2, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 160, "bos_token_id": start,
        "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "is_decoder": True,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": 16,
    }  # fmt: skip
    config = BlipConfig(
        text_config=text, vision_config=vision, projection_dim=32, architectures=["BlipForConditionalGeneration"]
    )
    model = BlipForConditionalGeneration(config)
    tokenizer = _word_pieces(vocabulary)
    told = [tokenizer.encode(f"a picture of {colour}").ids for colour in COLOURS]
    tokens = torch.tensor([[start, *ids[1:]] for ids in told])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    colours = torch.tensor(list(COLOURS.values())).view(-1, 3, 1, 1)
    pixels = ((colours / 255 - mean) / std).expand(-1, 3, SIDE, SIDE)
    _teach(model, lambda: model(pixel_values=pixels, input_ids=tokens, labels=tokens).loss, 0.005)
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    _write(path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    _write(path / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})


def _word_pieces(vocabulary: list[str]) -> Tokenizer:
    by_word = {word: place for place, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(by_word, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [("[CLS]", by_word["[CLS]"]), ("[SEP]", by_word["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def _teach(model: torch.nn.Module, loss: Callable[[], Any], rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    model.train()
    for step in range(600):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if value.item() < 0.01:
            print(f"{type(model).__name__}: {step} steps")
            return
    raise SystemExit(f"{type(model).__name__} learned nothing: {value.item()}")


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    t5(target / "t5")
    blip(target / "blip")
