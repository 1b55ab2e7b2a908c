"""Prompts of a wanted length in tokens, no two alike, without a tokenizer of our own.

Where the server counts for us (vLLM's `/tokenize`) words are chosen that cost one token each, so a
prompt's length is its word count plus what the template adds. Where it does not, a word counts as a
token, which is about right for English and never exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mdeploy.errors import UsageError

# Common, short, lower case: one token each (with the space before) in every large vocabulary.
_WORD_LIST = """
time year people way day man thing world life hand part child eye woman place work week case point
company number group problem fact water house story game power country book side line end city team
state family night study idea level field table color paper music river light north south door fire
road tree sound voice street plan price ship bird song rain
"""
_LITTLE_LIST = """
the a of to in is it for on be as at by we or an do if no so up he my me go us am and not you are can was
but all has had how one two who get use new now see our out any may b c d e f g k l m n o p r s t u v w
"""
WORDS = tuple(_WORD_LIST.split())
# What even a vocabulary of two thousand tokens holds whole.
LITTLE_WORDS = tuple(_LITTLE_LIST.split())
_OPENING = "Write"
_NONCE_WORDS = 4
_MOST_TAILS = 64
_TAIL_BYTES = 16 << 20
_FEWEST_WORDS = 16
_VERIFIED = 3

Count = Callable[[str], int]
"""Text of the prompt -> tokens of the whole request, template included."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What `LoadPlan` is made of: opening, nonce words, tails; `exact` if the lengths were verified."""

    opening: str
    nonce: tuple[str, ...]
    nonce_length: int
    tails: tuple[str, ...]
    exact: bool

    def text(self, number: int) -> str:
        """The prompt of request `number`."""
        nonce = spell(number, self.nonce, self.nonce_length)
        return self.opening + nonce + self.tails[number % len(self.tails)]


def spell(number: int, words: Sequence[str], length: int) -> str:
    """`number` in words, least significant first, so that neighbours differ in the first word."""
    parts = []
    for _ in range(length):
        number, digit = divmod(number, len(words))
        parts.append(" " + words[digit])
    return "".join(parts)


def build(input_tokens: int, seed: int, count: Count | None) -> Prompts:
    """Prompts of `input_tokens` tokens; raises UsageError where the template alone is longer."""
    if count is None:
        return _prompts(WORDS, max(1, input_tokens), seed, exact=False)
    overhead = count(_OPENING)
    if input_tokens <= overhead:
        raise UsageError(
            f"{input_tokens} input tokens cannot be had: the model's template alone takes {overhead}",
            hint=f"--input-tokens {overhead + 1} or more",
        )
    words = single_tokens(WORDS, overhead, count)
    if len(words) < _FEWEST_WORDS:
        words += single_tokens(LITTLE_WORDS, overhead, count)
    if len(words) < _FEWEST_WORDS:
        return _fitted(input_tokens, seed, count)
    prompts = _prompts(words, input_tokens - overhead, seed, exact=True)
    return _verified(prompts, input_tokens, count)


def single_tokens(words: Sequence[str], overhead: int, count: Count) -> tuple[str, ...]:
    """The words that cost one token each. A word costs at least one, so a group that costs as many
    tokens as it has words is all singles, and one call tells; other groups are halved.
    """
    if count(_OPENING + "".join(f" {word}" for word in words)) - overhead == len(words):
        return tuple(words)
    if len(words) == 1:
        return ()
    half = len(words) // 2
    return single_tokens(words[:half], overhead, count) + single_tokens(words[half:], overhead, count)


def _prompts(words: Sequence[str], length: int, seed: int, *, exact: bool) -> Prompts:
    nonce_length = min(_NONCE_WORDS, length)
    tail_length = length - nonce_length
    tails = max(1, min(_MOST_TAILS, _TAIL_BYTES // (8 * tail_length + 1)))
    chooser = random.Random(seed)
    nonce = list(words)
    chooser.shuffle(nonce)
    texts = ("".join(f" {word}" for word in chooser.choices(words, k=tail_length)) for _ in range(tails))
    return Prompts(_OPENING, tuple(nonce), nonce_length, tuple(texts), exact)


def _verified(prompts: Prompts, wanted: int, count: Count) -> Prompts:
    exact = all(count(prompts.text(number)) == wanted for number in range(_VERIFIED))
    return Prompts(prompts.opening, prompts.nonce, prompts.nonce_length, prompts.tails, exact)


def _fitted(wanted: int, seed: int, count: Count) -> Prompts:
    """A small vocabulary cuts words into pieces: search the number of words whose length comes closest."""
    low, high = 1, wanted
    while low < high:
        middle = (low + high + 1) // 2
        if count(_prompts(WORDS, middle, seed, exact=False).text(0)) <= wanted:
            low = middle
        else:
            high = middle - 1
    return _prompts(WORDS, low, seed, exact=False)
