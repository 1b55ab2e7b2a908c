"""What GME-Qwen2-VL reads: its prompt as token ids, and how many of them a picture takes.

    <|im_start|>system\\n{instruction}<|im_end|>\\n
    <|im_start|>user\\n[<|vision_start|>(<|image_pad|> x n)<|vision_end|>]{text}<|im_end|>\\n
    <|im_start|>assistant\\n<|endoftext|>

It knows nothing of HTTP and of the model: the edge writes prompts with it, decoders ask it for sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdeploy.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSTRUCTION = "You are a helpful assistant."
"""What GME was trained with where nobody gives another one."""

TILE = 28
"""Pixels on a side of what becomes one token: 2 x 2 patches of 14 x 14."""

MIN_TOKENS, MAX_TOKENS = 256, 1280
"""What GME's own code allows a picture; scaled up or down to it otherwise."""

MAX_ASPECT = 200
"""Longer side over the shorter one; what is more elongated cannot be scaled so (Qwen2-VL refuses it too)."""

_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|endoftext|>")
_REMEMBERED, _REMEMBERED_LENGTH = 256, 4096
"""How many instructions are kept as token ids, and of how many characters each at most: clients send them."""


def fitted(height: int, width: int) -> tuple[int, int]:
    """Height and width that a picture is scaled to: multiples of 28, 256 to 1280 tokens, nearly its own aspect.

    Qwen2-VL's `smart_resize` with GME's limits: each side to the nearest multiple, then, where that is too much
    (little), both sides by sqrt(pixels / allowed) and down (up) to a multiple.
    """
    rows, columns = round(height / TILE), round(width / TILE)
    if rows * columns > MAX_TOKENS:
        scale = math.sqrt(height * width / (MAX_TOKENS * TILE * TILE))
        rows = max(1, math.floor(height / scale / TILE))
        columns = max(1, math.floor(width / scale / TILE))
    elif rows * columns < MIN_TOKENS:
        scale = math.sqrt(MIN_TOKENS * TILE * TILE / (height * width))
        rows, columns = math.ceil(height * scale / TILE), math.ceil(width * scale / TILE)
    return rows * TILE, columns * TILE


def tokens(height: int, width: int) -> int:
    """How many tokens a picture of this size is, once it is `fitted`: prod(grid_thw) / 4."""
    return (height // TILE) * (width // TILE)


def prompts(file: Path) -> Prompts:
    """By the tokenizer in a file. Raises ConfigError for one that is not GME's."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{file} is no tokenizer: {error}", hint="download the model again") from error
    return Prompts(tokenizer)


class Prompts:
    """Writes prompts. Special tokens in what users write are plain text: nobody ends a turn but us."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes the tokenizer over. Raises ConfigError for one that is not GME's."""
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._start, self._end, self._vision_start, self._pad, self._vision_end, last = map(self._special, _SPECIAL)
        self._newline = self._plain("\n")
        self._user = self._plain("user\n")
        self._after = [self._end, *self._newline, self._start, *self._plain("assistant\n"), last]
        self._before: dict[str, list[int]] = {}

    def _plain(self, text: str) -> list[int]:
        [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # `encode` keeps the lock
        return list(found.ids)

    def _special(self, name: str) -> int:
        """The id of a special token that users cannot write. Raises ConfigError."""
        found = self._tokenizer.token_to_id(name)
        if found is None or self._plain(name) == [found]:
            raise ConfigError(f"tokenizer.json is not that of GME-Qwen2-VL: it has no special token {name}")
        return int(found)

    def write(
        self, texts: Sequence[str], pictures: Sequence[int], instructions: Sequence[str], most: int | None = None
    ) -> list[list[int]]:
        """The prompts of some texts (an empty one is none) with pictures of so many tokens (0: no picture).

        With `most`, texts are cut so that no prompt is longer, as far as that is possible.
        """
        # Text is tokenised with "user\n" before it where nothing stands between: the two may share a token.
        alone = [text if tokens else f"user\n{text}" for text, tokens in zip(texts, pictures, strict=True)]
        encoded = self._tokenizer.encode_batch_fast(alone, add_special_tokens=False)
        return [
            self._prompt(self._system(instruction), list(one.ids), tokens, most)
            for one, tokens, instruction in zip(encoded, pictures, instructions, strict=True)
        ]

    def _prompt(self, before: list[int], text: list[int], tokens: int, most: int | None) -> list[int]:
        head = list(before)
        if tokens:
            head += [*self._user, self._vision_start, *[self._pad] * tokens, self._vision_end]
        if most is not None:
            del text[max(0, most - len(head) - len(self._after)) :]
        return head + text + self._after

    def _system(self, instruction: str) -> list[int]:
        """Everything up to the user's turn; the instructions of a service are few."""
        known = self._before.get(instruction)
        if known is None:
            system = self._plain(f"system\n{instruction}")
            known = [self._start, *system, self._end, *self._newline, self._start]
            if len(self._before) >= _REMEMBERED:
                self._before.clear()
            if len(instruction) <= _REMEMBERED_LENGTH:
                self._before[instruction] = known
        return known
