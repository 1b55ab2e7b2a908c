"""A caption for a picture: BLIP looks at it and writes a sentence, or goes on with one that was begun.

    image -> squeezed to 384 x 384 -> (rgb - mean) / std -> vision transformer -> text decoder -> caption

Images of a batch share a call where their captions are decoded alike: same beams, same limit, beginnings of the same
number of tokens (BLIP's decoder has no padding on the left).
"""

import json
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mdeploy import Handler, HTTPError, Request
from mdeploy.serving import images

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LONGEST_PROMPT = 64


class Item(NamedTuple):
    """One image as the model takes it, the beginning of its caption as tokens, and how it is decoded."""

    pixels: Any
    prompt: tuple[int, ...]
    max_new_tokens: int
    num_beams: int

    @property
    def group(self) -> tuple[int, ...]:
        """Items of one group may share a call."""
        return (len(self.prompt), self.max_new_tokens, self.num_beams)


class Captioner(Handler):
    """Describe an image: a multipart form with a file `image`, or the image as the body.

    In the form or the query: `prompt`, the beginning of the caption (up to 64 tokens); `max_new_tokens`, 1 to 100
    (30); `num_beams`, 1 to 8 (1).
    """

    name = "caption"
    methods = ("POST",)
    max_batch_size = 16
    example = Request(headers=[(b"content-type", b"image/png")], body=images.plain())
    result = {"type": "object", "required": ["caption"], "properties": {"caption": {"type": "string"}}}
    responses = images.RESPONSES

    def init(self, device: str) -> None:
        """Load the model: float16 on a GPU, float32 on a CPU."""
        import torch
        from transformers import AutoTokenizer, BlipForConditionalGeneration

        dtype = torch.float32 if device == "cpu" else torch.float16
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        model = BlipForConditionalGeneration.from_pretrained(self.model_dir, dtype=dtype)
        self.device, self.model = device, model.to(device).eval()
        self.side = self.model.config.vision_config.image_size
        file = self.model_dir / "preprocessor_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.mean = np.array(settings.get("image_mean", CLIP_MEAN), np.float32)
        self.std = np.array(settings.get("image_std", CLIP_STD), np.float32)

    def preprocess(self, request: Request) -> Item:
        """The image, normalised, shape (3, side, side), and the wishes of its sender."""
        asked = {**request.query, **request.form}
        tokens, beams = _number(asked, "max_new_tokens", 30, 100), _number(asked, "num_beams", 1, 8)
        prompt = self._prompt(asked.get("prompt", "").strip())
        image = images.decode(images.upload(request)).resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return Item(pixels.transpose(2, 0, 1), prompt, tokens, beams)

    def _prompt(self, text: str) -> tuple[int, ...]:
        if len(text) > 20 * LONGEST_PROMPT:
            raise HTTPError(400, f"the prompt has {len(text)} characters, that is too long", code="text_too_long")
        tokens = tuple(self.tokenizer(text).input_ids) if text else ()
        if len(tokens) > LONGEST_PROMPT:
            told = f"the prompt has {len(tokens)} tokens, at most {LONGEST_PROMPT} are taken"
            raise HTTPError(400, told, code="text_too_long")
        return tokens

    def forward(self, batch: list[Item]) -> list[list[int]]:
        """Tokens of each caption."""
        groups: dict[Any, list[int]] = {}
        for place, item in enumerate(batch):
            groups.setdefault(item.group, []).append(place)
        written: list[list[int]] = [[] for _ in batch]
        for places in groups.values():
            for place, tokens in zip(places, self._written([batch[i] for i in places]), strict=True):
                written[place] = tokens
        return written

    def _written(self, items: list[Item]) -> list[list[int]]:
        import torch

        first = items[0]
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        prompts = torch.tensor([item.prompt for item in items]) if first.prompt else None
        with torch.inference_mode():
            rows: list[list[int]] = self.model.generate(
                pixel_values=pixels.to(self.device, self.model.dtype),
                input_ids=None if prompts is None else prompts.to(self.device),
                do_sample=False,
                num_beams=first.num_beams,
                max_new_tokens=first.max_new_tokens,
            ).tolist()
        return rows

    def postprocess(self, output: list[int]) -> dict[str, str]:
        """The caption, with its beginning."""
        return {"caption": self.tokenizer.decode(output, skip_special_tokens=True).strip()}


def _number(asked: dict[str, str], name: str, default: int, most: int) -> int:
    text = asked.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= most):
        raise HTTPError(400, f"{name}={text[:20]!r} must be a number from 1 to {most}", code="invalid_parameter")
    return int(text)
