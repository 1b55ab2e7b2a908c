"""From what clients send to what the model takes: pictures by the decoders, texts by the model's tokenizer."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdeploy.apps.embed import fields, slices
from mdeploy.apps.embed.inputs import Wish, place
from mdeploy.apps.embed.slices import CHARACTERS_A_TOKEN, Slices
from mdeploy.apps.gme import items, prompt, work
from mdeploy.apps.gme.items import Item, Upload
from mdeploy.apps.gme.prompt import Prompts
from mdeploy.apps.gme.work import Input, Picture
from mdeploy.serving.backend import Backend, OverloadedError
from mdeploy.serving.handler import HTTPError, Request
from mdeploy.serving.info import Reply

MAX_PICTURES = 64
"""Of one request: some 200 MB of pixels at most."""

_PICTURE_BYTES = prompt.MAX_TOKENS * prompt.TILE**2 * 3
_HELD_BYTES = 2 << 30
"""Pictures of all requests together, as they came and decoded."""

_AT_ONCE = 8
"""Pictures of one request that decoders have, so that those of others come between."""


class Room:
    """Counts what pictures take in this process, until their requests are over."""

    def __init__(self, most: int = _HELD_BYTES) -> None:
        self._most, self._held = most, 0

    def take(self, size: int) -> None:
        """For the request that the current task answers. Raises OverloadedError."""
        if self._held + size > self._most:
            raise OverloadedError(1.0, "too many pictures at once, try again later")
        self._held += size
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._free(size))

    def _free(self, size: int) -> None:
        self._held -= size


@dataclass(frozen=True, slots=True)
class Told:
    """What stands around the texts of a request."""

    instruction: str
    before: str
    room: int | None


class Inputs:
    """The inputs of one model's clients; see `embed.inputs.Inputs`. `instruction` is that of queries."""

    def __init__(self, decoder: Backend, prompts: Prompts, max_length: int, instruction: str | None = None) -> None:
        self._decoder, self._prompts, self._max_length = decoder, prompts, max_length
        self._instruction = instruction or prompt.INSTRUCTION
        self._room = Room()
        self._slices = Slices()

    def parse(self, value: Any, param: str) -> Item:
        """See `items.parse`."""
        return items.parse(value, param)

    async def prepare(self, items: Sequence[Item], wish: Wish, param: str) -> Sequence[Input]:
        """Each with its prompt and its picture. Raises HTTPError, OverloadedError."""
        told = self._told(wish)
        self._check(items, told, param)
        pictures = await self._decoded(items, param)
        ids = await self._written(items, pictures, told)
        for index, each in enumerate(ids):
            self._check_length(len(each), told, place(param, index, len(items)))
        return [Input(each, picture) for each, picture in zip(ids, pictures, strict=True)]

    def tokens(self, load: Input) -> int:
        """Of text and picture."""
        return len(load.ids)

    def pack(self, loads: Sequence[Input], dim: int) -> bytes:
        """As `work` has it."""
        return work.pack(loads, dim)

    def health(self) -> Mapping[str, Any]:
        """What /health says of inputs."""
        has_query = self._instruction != prompt.INSTRUCTION
        return {"prompts": (), "has_query": has_query, "images": True, "max_images": MAX_PICTURES}

    # wishes

    def _told(self, wish: Wish) -> Told:
        if wish.prompt_name is not None:
            fields.wrong("prompt_name", f"is {wish.prompt_name[:40]!r}: this model has none", "unknown_prompt")
        if wish.instruction is not None and wish.kind == "document":
            fields.wrong("instruction", 'is for queries, input_type is "document"')
        usual = self._instruction if wish.kind == "query" else prompt.INSTRUCTION
        return Told(wish.instruction or usual, wish.prompt or "", wish.room)

    def _check(self, items: Sequence[Item], told: Told, param: str) -> None:
        """Before anything is worked on. Raises HTTPError 400."""
        count = sum(item.image is not None for item in items)
        if count > MAX_PICTURES:
            text = f"has {count} images, at most {MAX_PICTURES} are taken in one request"
            fields.wrong(param, text, "too_many_images")
        slices.check_repeated(len(told.before) + len(told.instruction), len(items), param)
        most = CHARACTERS_A_TOKEN * self._max_length
        for index, item in enumerate(items):
            size = _characters(item, told)
            if size > most:
                text = f"is too long: it has {size} characters with its prompt, at most {most} are read"
                fields.wrong(place(param, index, len(items)), text, "context_length_exceeded")

    def _check_length(self, tokens: int, told: Told, param: str) -> None:
        most = min(told.room or self._max_length, self._max_length)
        if tokens > most:
            what = f"has {tokens} tokens with its prompt, at most {most} are taken"
            hint = "text is cut, prompt and picture are not" if told.room else "shorten it, or send truncate: true"
            fields.wrong(param, f"{what}: {hint}", "context_length_exceeded")

    # texts

    async def _written(self, items: Sequence[Item], pictures: Sequence[Picture | None], told: Told) -> list[array[int]]:
        sizes = [0 if one is None else prompt.tokens(one.height, one.width) for one in pictures]

        def write(start: int, end: int) -> list[array[int]]:
            some = items[start:end]
            texts = [told.before + item.text if item.text else "" for item in some]
            instructions = [item.instruction or told.instruction for item in some]
            found = self._prompts.write(texts, sizes[start:end], instructions, told.room)
            return [array("I", ids) for ids in found]

        return await self._slices.run([_characters(item, told) for item in items], write)

    # pictures

    async def _decoded(self, items: Sequence[Item], param: str) -> list[Picture | None]:
        """The pictures, in the order of the items; with the first that fails all are given up."""
        uploads = {index: item.image for index, item in enumerate(items) if item.image is not None}
        found: list[Picture | None] = [None] * len(items)
        if not uploads:
            return found
        self._room.take(sum(len(upload.data) + _PICTURE_BYTES for upload in uploads.values()))
        left = iter(uploads.items())

        async def work_off() -> None:
            for index, upload in left:
                found[index] = await self._decode(upload, place(param, index, len(items)))

        tasks = [asyncio.ensure_future(work_off()) for _ in range(min(_AT_ONCE, len(uploads)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            await _end(tasks)
        return found

    async def _decode(self, upload: Upload, param: str) -> Picture:
        """Raises HTTPError with the decoder's status, OverloadedError."""
        headers = work.BASE64 if upload.is_base64 else ()
        call = self._decoder.submit(Request(headers=headers, body=upload.data), lambda: False)
        try:
            reply = await call.reply()
        except BaseException:
            call.cancel()
            raise
        if reply.status != 200:
            raise _refused(reply, param)
        return work.picture(reply.body)


def _characters(item: Item, told: Told) -> int:
    """Of a text with everything around it."""
    return len(item.text) + len(told.before) + len(item.instruction or told.instruction)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Give up what is not done.

    The list is emptied: an error's traceback holds whoever has it, and a task holds the error, so that uploads would
    outlive their request until garbage is collected.
    """
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


def _refused(reply: Reply, param: str) -> HTTPError:
    """A decoder's error as the client gets it: what kills decoders again and again is no picture."""
    if reply.code == "worker_died":
        return HTTPError(400, "the image cannot be decoded: the decoder dies of it", code="invalid_image", param=param)
    return HTTPError(reply.status, reply.message, code=reply.code, param=param, headers=dict(reply.headers))
