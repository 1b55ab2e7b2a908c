"""Answers, translations, summaries: Flan-T5 reads a text and writes another one.

Requests of a batch may ask for different things. Those that are decoded alike go through the model together: greedy
ones of about the same length, where each is cut at its own; with beams the length steers the search, so only equal
ones share a call.
"""

from typing import Any, NamedTuple

from mdeploy import Handler, HTTPError, Request

MOST_INPUT = 512
"""Tokens; Flan-T5 was trained on no more."""


class Wish(NamedTuple):
    """How a text is to be written."""

    max_new_tokens: int
    num_beams: int
    length_penalty: float

    @property
    def group(self) -> tuple[Any, ...]:
        """Requests of one group may share a call."""
        greedy = self.num_beams == 1
        return (1, (self.max_new_tokens - 1).bit_length()) if greedy else tuple(self)


class Item(NamedTuple):
    """One request: the text as tokens, and how the answer is to be written."""

    tokens: list[int]
    wish: Wish


class TextToText(Handler):
    """Write a text from a text. `{"text": "translate English to German: How old are you?"}`."""

    name = "generate"
    methods = ("POST",)
    max_batch_size = 32
    max_batch_cost = 32_768
    example = {"text": "translate English to German: How old are you?", "max_new_tokens": 8}
    body = {
        "type": "object",
        "required": ["text"],
        "additionalProperties": False,
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": 32768},
            "max_new_tokens": {"type": "integer", "minimum": 1, "maximum": 512, "default": 64},
            "num_beams": {"type": "integer", "minimum": 1, "maximum": 8, "default": 1},
            "length_penalty": {"type": "number", "minimum": -5, "maximum": 5, "default": 1},
        },
    }
    result = {
        "type": "object",
        "required": ["text", "tokens", "finish_reason"],
        "properties": {
            "text": {"type": "string"},
            "tokens": {"type": "integer"},
            "finish_reason": {"enum": ["stop", "length"]},
        },
    }

    def init(self, device: str) -> None:
        """Load the model: half the bytes on a GPU, float32 on a CPU."""
        import torch
        from transformers import AutoTokenizer, T5ForConditionalGeneration

        half = torch.bfloat16 if device != "cpu" and torch.cuda.is_bf16_supported() else torch.float16
        self.dtype = torch.float32 if device == "cpu" else half
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        model = T5ForConditionalGeneration.from_pretrained(self.model_dir, dtype=self.dtype)
        self.device, self.model = device, model.to(device).eval()

    def preprocess(self, request: Request) -> Item:
        """Tokens of the text. What fits `body` arrives here; HTTPError 400 for a text that is empty or too long."""
        asked = request.json()
        if not asked["text"].strip() or not _is_text(asked["text"]):
            raise HTTPError(400, "the text is empty, or no Unicode", code="invalid_text")
        tokens = self.tokenizer(asked["text"], truncation=False, verbose=False).input_ids
        if len(tokens) > MOST_INPUT:
            text = f"the text has {len(tokens)} tokens, at most {MOST_INPUT} are taken"
            raise HTTPError(400, text, code="text_too_long")
        limit, beams = (int(asked.get(name, default)) for name, default in (("max_new_tokens", 64), ("num_beams", 1)))
        return Item(tokens, Wish(limit, beams, float(asked.get("length_penalty", 1))))

    def cost(self, item: Item) -> float:
        """Tokens it reads and may write, for each beam."""
        return float((len(item.tokens) + item.wish.max_new_tokens) * item.wish.num_beams)

    def forward(self, batch: list[Item]) -> list[list[int]]:
        """Tokens of each answer, without the start token."""
        groups: dict[Any, list[int]] = {}
        for place, item in enumerate(batch):
            groups.setdefault(item.wish.group, []).append(place)
        written: list[list[int]] = [[] for _ in batch]
        for places in groups.values():
            for place, tokens in zip(places, self._written([batch[i] for i in places]), strict=True):
                written[place] = tokens
        return written

    def _written(self, items: list[Item]) -> list[list[int]]:
        import torch

        inputs = self.tokenizer.pad({"input_ids": [item.tokens for item in items]}, return_tensors="pt")
        wish = items[0].wish
        with torch.inference_mode():
            rows = self.model.generate(
                **inputs.to(self.device),
                do_sample=False,
                num_beams=wish.num_beams,
                # Means something for beams only, and generate() warns of it otherwise.
                length_penalty=wish.length_penalty if wish.num_beams > 1 else None,
                max_new_tokens=max(item.wish.max_new_tokens for item in items),
            )
        return [row[1 : 1 + item.wish.max_new_tokens] for row, item in zip(rows.tolist(), items, strict=True)]

    def postprocess(self, output: list[int]) -> dict[str, Any]:
        """The text, how many tokens it took, and whether the model or the limit ended it."""
        end = self.model.config.eos_token_id
        stopped = end in output
        tokens = output[: output.index(end)] if stopped else output
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return {"text": text, "tokens": len(tokens), "finish_reason": "stop" if stopped else "length"}


def _is_text(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can carry and no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
