"""How the pictures of a request are handed to decoders, with decoders that do as the test says."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mdeploy.apps.embed.inputs import Wish
from mdeploy.apps.gme import work
from mdeploy.apps.gme.inputs import MAX_PICTURES, Inputs, Room
from mdeploy.apps.gme.items import Item, Upload
from mdeploy.apps.gme.prompt import Prompts
from mdeploy.serving.backend import OverloadedError
from mdeploy.serving.handler import HTTPError, Request
from mdeploy.serving.info import Reply
from tests.gme.test_prompt import tokenizer


class Decoder:
    """A Backend whose calls the test answers, by the picture."""

    def __init__(self) -> None:
        self.asked: dict[bytes, asyncio.Future[Reply]] = {}
        self.cancelled: set[bytes] = set()

    def submit(self, request: Request, gone: Callable[[], bool], cost: float = 1.0) -> Any:
        self.asked[request.body] = asyncio.get_running_loop().create_future()
        return Asked(self, request.body)

    def answer(self, name: bytes) -> None:
        """With a picture that is so many tokens high as the name says."""
        height = 28 * (1 + int(name))
        self.asked[name].set_result(Reply(200, "", work.pack_picture(height, 28, bytes(height * 28 * 3))))

    async def until_asked(self, count: int) -> None:
        for _ in range(10_000):
            if len(self.asked) >= count:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{len(self.asked)} pictures were asked for")


class Asked:
    def __init__(self, decoder: Decoder, name: bytes) -> None:
        self._decoder, self._name = decoder, name

    async def reply(self) -> Reply:
        return await self._decoder.asked[self._name]

    def cancel(self) -> None:
        self._decoder.cancelled.add(self._name)


def run(play: Callable[[Inputs, Decoder], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        decoder = Decoder()
        await play(Inputs(decoder, Prompts(tokenizer()), 4096), decoder)  # type: ignore[arg-type]

    asyncio.run(main())


def pictures(count: int) -> list[Item]:
    return [Item(image=Upload(b"%d" % number)) for number in range(count)]


def test_pictures_come_back_in_order_a_few_at_a_time() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        task = asyncio.create_task(inputs.prepare([Item("a"), *pictures(20)], Wish(), "input"))
        await decoder.until_asked(8)
        assert len(decoder.asked) == 8
        for count in range(1, 21):
            await decoder.until_asked(min(20, 7 + count))
            decoder.answer([name for name, reply in decoder.asked.items() if not reply.done()][-1])
        found = await task
        assert [each.picture and each.picture.height // 28 for each in found] == [None, *range(1, 21)]
        assert [inputs.tokens(each) - inputs.tokens(found[1]) for each in found[1:]] == list(range(20))

    run(play)


def test_the_first_that_fails_ends_the_others() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        task = asyncio.create_task(inputs.prepare(pictures(3), Wish(), "input"))
        await decoder.until_asked(3)
        decoder.asked[b"1"].set_result(Reply(413, "", code="image_too_large", message="too large"))
        with pytest.raises(HTTPError, match="too large") as caught:
            await task
        assert (caught.value.status, caught.value.param) == (413, "input[1]")
        assert decoder.cancelled == {b"0", b"2"}

    run(play)


def test_instructions_of_their_own_are_work_for_a_thread_too() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        items = [Item("a"), *(Item("a", instruction=f"{number} " * 1500) for number in range(3))]
        task = asyncio.create_task(inputs.prepare(items, Wish(), "input"))
        await asyncio.sleep(0)  # what is done in the event loop is done now
        assert not task.done()
        assert [inputs.tokens(each) > 1500 for each in await task] == [False, True, True, True]

    run(play)


def test_a_prompt_for_many_inputs_is_refused_where_it_becomes_too_much() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        for wish in (Wish(prompt="word " * 2000), Wish(instruction="word " * 2000)):
            with pytest.raises(HTTPError, match="goes with each of 2048") as caught:
                await inputs.prepare([Item("a")] * 2048, wish, "input")
            assert (caught.value.status, caught.value.param) == (400, "input")

    run(play)


class Watched(Upload):
    """An upload whose end can be seen."""


def test_uploads_that_are_refused_do_not_wait_for_the_garbage_collector() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        items = [Item(image=Watched(b"0")), *pictures(2)[1:]]
        assert items[0].image is not None
        seen = weakref.ref(items[0].image)
        task = asyncio.create_task(inputs.prepare(items, Wish(), "input"))
        await decoder.until_asked(2)
        decoder.asked[b"0"].set_result(Reply(413, "", code="image_too_large", message="too large"))
        with pytest.raises(HTTPError):
            await task
        decoder.asked.clear()
        del items, task
        await asyncio.sleep(0)
        assert seen() is None

    gc.disable()
    try:
        run(play)
    finally:
        gc.enable()


def test_a_client_that_leaves_ends_them_all() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        task = asyncio.create_task(inputs.prepare(pictures(3), Wish(), "input"))
        await decoder.until_asked(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert decoder.cancelled == {b"0", b"1", b"2"}

    run(play)


def test_a_picture_that_kills_decoders_is_the_clients_fault() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        task = asyncio.create_task(inputs.prepare(pictures(1), Wish(), "file"))
        await decoder.until_asked(1)
        decoder.asked[b"0"].set_result(Reply(500, "", code="worker_died", message="2 workers died"))
        with pytest.raises(HTTPError) as caught:
            await task
        assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_image", "file")

    run(play)


def test_too_many_pictures_are_refused_before_any_is_decoded() -> None:
    async def play(inputs: Inputs, decoder: Decoder) -> None:
        with pytest.raises(HTTPError, match=f"65 images, at most {MAX_PICTURES}"):
            await inputs.prepare(pictures(65), Wish(), "input")
        assert not decoder.asked

    run(play)


def test_room_is_taken_until_the_request_is_over() -> None:
    async def main() -> None:
        room, over = Room(10), asyncio.Event()

        async def request(size: int) -> None:
            room.take(size)
            await over.wait()

        first = asyncio.create_task(request(6))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="too many pictures"):
            await asyncio.create_task(request(5))
        second = asyncio.create_task(request(4))
        await asyncio.sleep(0)
        over.set()
        await asyncio.gather(first, second)
        await asyncio.sleep(0)
        room.take(10)

    asyncio.run(main())
