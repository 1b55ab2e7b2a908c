"""What is embedded: texts of known lengths, made of whole words of the model's own vocabulary.

Lengths in tokens, [CLS] and [SEP] included, are lognormal (median 45, sigma 0.8) and clipped to 8..256: mean about 61,
so three quarters of a batch padded to 256 would be padding. No two texts are the same, so no cache can help.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEDIAN, SIGMA, SHORTEST, LONGEST = 45, 0.8, 8, 256
_SPECIAL = 2
_FEWEST_WORDS = 100


@dataclass(frozen=True)
class Text:
    """One text and how many tokens the model makes of it."""

    text: str
    tokens: int


def words(model: Path) -> tuple[str, ...]:
    """The words that are one token each. Raises ValueError for a model that has not enough of them."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    found = tuple(sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower()))
    if len(found) < _FEWEST_WORDS:
        raise ValueError(f"{model} has only {len(found)} whole words, it wants a vocabulary like BERT's")
    return found


def endless(vocabulary: tuple[str, ...], seed: int) -> Iterator[Text]:
    """Texts without end; the same seed gives the same ones."""
    chance = random.Random(seed)
    while True:
        tokens = round(min(LONGEST, max(SHORTEST, chance.lognormvariate(math.log(MEDIAN), SIGMA))))
        yield Text(" ".join(chance.choices(vocabulary, k=tokens - _SPECIAL)), tokens)


def corpus(model: Path, count: int, seed: int = 1) -> tuple[Text, ...]:
    """The texts of a run."""
    source = endless(words(model), seed)
    return tuple(next(source) for _ in range(count))
