"""Texts to token ids, by the model's own tokenizer and at the edge: it knows the length of every text at once."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from mdeploy.apps.embed import fields, frames, slices, work
from mdeploy.apps.embed.frames import Ids
from mdeploy.apps.embed.inputs import Wish, place
from mdeploy.apps.embed.options import TokenIds
from mdeploy.apps.embed.prompts import Prompts
from mdeploy.apps.embed.slices import CHARACTERS_A_TOKEN, Slices
from mdeploy.apps.embed.work import Tokens
from mdeploy.errors import ConfigError

_CHARACTERS = 64 << 10
"""So many characters of a text are looked at, however few tokens it may have."""

_REFUSED = (
    "is made of token ids, which this service does not take: they may come from another tokenizer. Send texts"
    " (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False), or start the service with --token-ids model"
    " where they are the model's own"
)

_TOO_LONG = "context_length_exceeded"


class Texts:
    """The texts of one model's clients; see `inputs.Inputs`."""

    def __init__(self, file: Path, prompts: Prompts, max_length: int, token_ids: TokenIds = "reject") -> None:
        """Raises ConfigError for a file that is no tokenizer."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our threads are as many as there shall be
        self._tokenizer = _load(file)
        self._prompts, self._max_length, self._token_ids = prompts, max_length, token_ids
        self._most = max(_CHARACTERS, CHARACTERS_A_TOKEN * max_length)
        self._slices = Slices()
        self._vocabulary = self._tokenizer.get_vocab_size()
        self._frame, self._pair = frames.frame(self._tokenizer), frames.pair_frame(self._tokenizer)

    # one text

    def parse(self, value: Any, param: str) -> str | Tokens:
        """A text, {"text": …}, or an array of token ids. Raises HTTPError 400."""
        return self._ids(value, param) if isinstance(value, list) else self.text(value, param)

    def text(self, value: Any, param: str) -> str:
        """A text or {"text": …}. Raises HTTPError 400."""
        if isinstance(value, dict):
            value = _field(value, param)
        if not isinstance(value, str):
            fields.wrong(param, f"is {fields.kind(value)}, a text is expected", "invalid_type")
        return value or fields.wrong(param, "is an empty text", "empty_input")

    def _ids(self, ids: list[Any], param: str) -> Tokens:
        if not ids:
            fields.wrong(param, "is an empty array", "empty_input")
        if not all(type(each) is int for each in ids[: self._max_length + 1]):  # more are refused, whatever they are
            fields.wrong(param, "is an array, a text is expected", "invalid_type")
        if self._token_ids == "reject":
            fields.wrong(param, _REFUSED, "token_ids_not_supported")
        if len(ids) > self._max_length:
            self._too_long(param, len(ids))
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            fields.wrong(param, f"has token ids that are none of the model's: 0 to {self._vocabulary - 1}")
        if not self._frame.holds(ids):
            ends = f"{self._frame.before} at its start and {self._frame.after} at its end"
            fields.wrong(param, f"must be whole, with the model's special tokens: {ends}")
        return Tokens(array("I", ids))

    # many

    async def prepare(self, items: Sequence[str | Tokens], wish: Wish, param: str) -> Sequence[Tokens]:
        """Tokens of each. Raises HTTPError 400 for what is too long, or for texts among token ids."""
        before = self._prompts.of(wish)
        ready = [item for item in items if isinstance(item, Tokens)]
        if ready:
            if len(ready) < len(items) or before:
                mixed = "texts" if len(ready) < len(items) else "a prompt"
                fields.wrong(param, f"has token ids, which cannot be together with {mixed}")
            return ready
        texts = [item for item in items if isinstance(item, str)]
        slices.check_repeated(len(before), len(texts), param)

        def encode(start: int, end: int) -> list[Tokens]:
            framed = (before + text for text in texts[start:end])
            return self._encode(framed, wish.room, lambda index: place(param, start + index, len(items)))

        return await self._slices.run([len(before) + len(text) for text in texts], encode)

    async def pairs(self, query: str, documents: Sequence[str], wish: Wish, param: str) -> Sequence[Tokens]:
        """Tokens of the query with each document, for a cross-encoder. Raises HTTPError 400 for what is too long."""
        query = self._bounded(query, wish.room, "query")
        [first] = await self._slices.run([len(query)], lambda start, end: self._bare([query]))

        def encode(start: int, end: int) -> list[Tokens]:
            part = documents[start:end]
            return self._encode_pairs(first, part, wish.room, lambda index: place(param, start + index, len(documents)))

        return await self._slices.run([len(text) for text in documents], encode)

    def tokens(self, load: Tokens) -> int:
        """How many."""
        return len(load.ids)

    def pack(self, loads: Sequence[Tokens], dim: int) -> bytes:
        """As `work` has it."""
        return work.pack(loads, dim)

    def health(self) -> Mapping[str, Any]:
        """See `Inputs`."""
        return {"prompts": self._prompts.names, "has_query": self._prompts.has_query}

    # in the loop or in a thread

    def _encode(self, texts: Iterable[str], room: int | None, where: Callable[[int], str]) -> list[Tokens]:
        bounded = [self._bounded(text, room, where(index)) for index, text in enumerate(texts)]
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(bounded)]
        most = room or self._max_length
        for index, ids in enumerate(found):
            if not ids:
                fields.wrong(where(index), "has no token that the model knows", "empty_input")
            if len(ids) > most:
                left = self._left(room, self._frame.special, len(ids), where(index))
                found[index] = self._frame.cut(ids, left)
        return [Tokens(array("I", ids)) for ids in found]

    def _bare(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts without special tokens."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_pairs(
        self, first: Ids, texts: Sequence[str], room: int | None, where: Callable[[int], str]
    ) -> list[Tokens]:
        seconds = self._bare([self._bounded(text, room, where(index)) for index, text in enumerate(texts)])
        special, most = self._pair.special, room or self._max_length
        found = []
        for index, second in enumerate(seconds):
            keep, keep_second = len(first), len(second)
            total = keep + keep_second + special
            if total > most:
                left = self._left(room, special, total, where(index))
                keep, keep_second = frames.shares(keep, keep_second, left)
            found.append(self._pair.join(first[:keep], second[:keep_second]))
        return found

    def _bounded(self, text: str, room: int | None, param: str) -> str:
        """The text as far as it is looked at."""
        if len(text) > self._most and room is None:
            least = f"has {len(text)} characters, at most {self._most} are read ({self._max_length} tokens)"
            fields.wrong(param, f"is too long: it {least}", _TOO_LONG)
        return text[: self._most]

    def _left(self, room: int | None, special: int, tokens: int, param: str) -> int:
        """Tokens of a cut text without the special ones. Raises HTTPError 400 where it may not be cut."""
        if room is None:
            self._too_long(param, tokens)
        if room <= special:
            fields.wrong("truncate_prompt_tokens", f"must be {special + 1} or more for this model")
        return room - special

    def _too_long(self, param: str, tokens: int) -> NoReturn:
        text = f"has {tokens} tokens, this model takes at most {self._max_length}: shorten it, or send truncate: true"
        fields.wrong(param, text, _TOO_LONG)


def _load(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{file} is no tokenizer: {error}", hint="download the model again") from error
    tokenizer.no_padding()  # some models' files ask for both
    tokenizer.no_truncation()
    return tokenizer


def _field(value: dict[str, Any], param: str) -> Any:
    others = sorted(value.keys() - {"text"})
    if others or "text" not in value:
        named = others[0][:40] if others else "no text"
        fields.wrong(param, f"is an object with {named}: this model takes texts only", "invalid_type")
    return value["text"]
