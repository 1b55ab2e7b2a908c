"""Texts to token ids, by the model's own tokenizer and at the edge: it knows the length of every text at once.

Short ones are done in the event loop, which takes less time than handing them to a thread. The others go to threads,
a slice at a time, so that a large request holds up nobody; the tokenizer lets go of the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, cast

from tokenizers import Tokenizer

from mdeploy.apps.embed import fields, frames, work
from mdeploy.apps.embed.inputs import Wish, place
from mdeploy.apps.embed.options import TokenIds
from mdeploy.apps.embed.prompts import Prompts
from mdeploy.apps.embed.work import Tokens
from mdeploy.errors import ConfigError

_INLINE = 2_000
"""Characters that are tokenised in about half a millisecond, in the event loop."""

_SLICE = 100_000
"""Characters that one task of a thread has, about 30 ms."""

_THREADS = 4

_CHARACTERS_A_TOKEN, _CHARACTERS = 32, 64 << 10
"""A text of more characters than so many for each token it may have (and than the second number) is not looked at.

It could only fit if it were blanks; to count its tokens would take as long as the client likes."""

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
        self._most = max(_CHARACTERS, _CHARACTERS_A_TOKEN * max_length)
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "tokenise")
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
        if not all(type(each) is int for each in ids):
            fields.wrong(param, "is an array, a text is expected", "invalid_type")
        if self._token_ids == "reject":
            fields.wrong(param, _REFUSED, "token_ids_not_supported")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            fields.wrong(param, f"has token ids that are none of the model's: 0 to {self._vocabulary - 1}")
        if len(ids) > self._max_length:
            self._too_long(param, len(ids))
        if not self._frame.holds(ids):
            ends = f"{self._frame.before} at its start and {self._frame.after} at its end"
            fields.wrong(param, f"must be whole, with the model's special tokens: {ends}")
        return Tokens(ids)

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
        texts = [before + item for item in items if isinstance(item, str)] if before else cast(Sequence[str], items)

        def encode(start: int, part: Sequence[str]) -> list[Tokens]:
            return self._encode(part, wish.room, lambda index: place(param, start + index, len(items)))

        return await self._sliced(texts, 0, encode)

    async def pairs(self, query: str, documents: Sequence[str], wish: Wish, param: str) -> Sequence[Tokens]:
        """Tokens of the query with each document, for a cross-encoder. Raises HTTPError 400 for what is too long."""

        def encode(start: int, part: Sequence[str]) -> list[Tokens]:
            return self._encode_pairs(query, part, wish.room, lambda index: place(param, start + index, len(documents)))

        self._bounded(query, wish.room, "query")
        return await self._sliced(documents, len(query), encode)

    def tokens(self, load: Tokens) -> int:
        """How many."""
        return len(load.ids)

    def pack(self, loads: Sequence[Tokens], dim: int) -> bytes:
        """As `work` has it."""
        return work.pack(loads, dim)

    def health(self) -> Mapping[str, Any]:
        """See `Inputs`."""
        return {"prompts": self._prompts.names, "has_query": self._prompts.has_query}

    async def _sliced(
        self, texts: Sequence[str], more: int, encode: Callable[[int, Sequence[str]], list[Tokens]]
    ) -> list[Tokens]:
        """All texts, each of which costs `more` characters besides its own."""
        lengths = [len(text) + more for text in texts]
        if sum(lengths) <= _INLINE:
            return encode(0, texts)
        loop = asyncio.get_running_loop()
        found: list[Tokens] = []
        for start, end in _slices(lengths):
            found += await loop.run_in_executor(self._threads, encode, start, texts[start:end])
        return found

    # in the loop or in a thread

    def _encode(self, texts: Sequence[str], room: int | None, where: Callable[[int], str]) -> list[Tokens]:
        texts = [self._bounded(text, room, where(index)) for index, text in enumerate(texts)]
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]
        most = room or self._max_length
        for index, ids in enumerate(found):
            if not ids:
                fields.wrong(where(index), "has no token that the model knows", "empty_input")
            if len(ids) > most:
                left = self._left(room, self._frame.special, len(ids), where(index))
                found[index] = self._frame.cut(ids, left)
        return list(map(Tokens, found))

    def _encode_pairs(
        self, query: str, texts: Sequence[str], room: int | None, where: Callable[[int], str]
    ) -> list[Tokens]:
        query = self._bounded(query, room, "query")
        texts = [self._bounded(text, room, where(index)) for index, text in enumerate(texts)]
        encoded = self._tokenizer.encode_batch_fast([query, *texts], add_special_tokens=False)
        first, *seconds = (encoding.ids for encoding in encoded)
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


def _slices(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that are about one slice long."""
    start = total = 0
    for index, length in enumerate(lengths):
        if total and total + length > _SLICE:
            yield start, index
            start, total = index, 0
        total += length
    yield start, len(lengths)
