"""The special tokens that a tokenizer puts around a text and a pair, so that texts can be cut and keep them.

By hand: to cut a long pair the library takes time that grows with the product of what is cut off both. A last-token
model pools the special token at the end, so it must be the body that is cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from mdeploy.apps.embed.work import Tokens
from mdeploy.errors import ConfigError

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around one text."""

    before: Ids
    after: Ids

    @property
    def special(self) -> int:
        """How many tokens they are."""
        return len(self.before) + len(self.after)

    def cut(self, ids: Ids, body: int) -> Ids:
        """A framed text with so many tokens of its own."""
        return ids[: len(self.before) + body] + self.after

    def holds(self, ids: Ids) -> bool:
        """Whether these ids are framed."""
        start, end = len(self.before), len(ids) - len(self.after)
        return start <= end and ids[:start] == self.before and ids[end:] == self.after


@dataclass(frozen=True, slots=True)
class PairFrame:
    """What stands around and between two texts; type 1 begins `offset` tokens after the first, if anywhere."""

    before: Ids
    between: Ids
    after: Ids
    offset: int | None

    @property
    def special(self) -> int:
        """How many tokens they are."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: Ids, second: Ids) -> Tokens:
        """Two bare texts as the model wants them."""
        start = 0 if self.offset is None else len(self.before) + len(first) + self.offset
        return Tokens(array("I", [*self.before, *first, *self.between, *second, *self.after]), start)


def frame(tokenizer: Tokenizer) -> Frame:
    """Raises ConfigError for a tokenizer that knows no letter."""
    encoding = tokenizer.encode("a")
    start, end = _span(encoding.sequence_ids, 0)
    return Frame(encoding.ids[:start], encoding.ids[end:])


def pair_frame(tokenizer: Tokenizer) -> PairFrame:
    """Raises ConfigError for a tokenizer that knows no letter."""
    encoding = tokenizer.encode("a", "a")
    ids, types = encoding.ids, encoding.type_ids
    (start, end), (start_second, end_second) = (_span(encoding.sequence_ids, number) for number in (0, 1))
    offset = types.index(1) - end if 1 in types else None
    return PairFrame(ids[:start], ids[end:start_second], ids[end_second:], offset)


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text fit: the longer one is cut first, as Transformers does."""
    kept = min(first, second, room // 2)
    return (kept, room - kept) if first <= second else (room - kept, kept)


def _span(owners: Sequence[int | None], number: int) -> tuple[int, int]:
    """Where the tokens of one text are."""
    if number not in owners:
        raise ConfigError("its tokenizer makes no token of the letter a", hint="download the model again")
    return owners.index(number), len(owners) - owners[::-1].index(number)
