"""Under load: large requests hold up nobody, who left is not worked for, and what is too much is refused at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from mdeploy.apps.embed.fan import Gate, split
from tests.embed.served import Service, standin
from tests.embed.standin import BUDGET
from tests.support import until

POISON = "zzz"


@pytest.fixture(scope="module")
def service(embed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    tokenizer = Tokenizer.from_file(str(embed_models / "qwen3/tokenizer.json"))
    poison = str(tokenizer.encode(POISON).ids[0])
    with standin(tmp_path_factory.mktemp("load"), embed_models / "qwen3", env={"STANDIN_POISON": poison}) as found:
        yield found


def under_way(service: Service) -> int:
    handler = service.health()["handlers"]["embed"]
    return int(handler["queued"] + handler["in_flight"])


def waiting(service: Service) -> float:
    """Tokens of requests without an answer."""
    lines = service.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("mdeploy_tokens_waiting{"))


def connect(service: Service, body: Any) -> socket.socket:
    """A request whose answer nobody has read."""
    content = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=30)
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: t\r\nContent-Length: {len(content)}\r\n\r\n"
    sock.sendall(head.encode() + content)
    return sock


def test_a_single_text_overtakes_a_large_request(service: Service) -> None:
    before = len(service.seen())
    with ThreadPoolExecutor(2) as threads, service.held():
        large = threads.submit(service.rows, ["the cat sat on the mat"] * 2000)
        until(lambda: under_way(service) > 1, what="the large request is under way")
        most = under_way(service)
        single = threads.submit(service.rows, "a single text")
        until(lambda: under_way(service) > most, what="the single text is in the queue")
        service.go_on()
        assert single.result().shape == (1, 64)
        assert large.result().shape == (2000, 64)
    batches = service.seen()[before:]
    turn = next(number for number, batch in enumerate(batches) if 1 in batch)
    assert turn <= 5 < len(batches) / 4


def test_two_large_requests_share_the_worker(service: Service) -> None:
    before, already = len(service.seen()), waiting(service)
    with ThreadPoolExecutor(2) as threads, service.held():
        first = threads.submit(service.rows, ["a"] * 2000)  # 32 in a piece
        until(lambda: waiting(service) > already)
        of_first = waiting(service)
        second = threads.submit(service.rows, ["the cat sat on the mat"] * 200)
        until(lambda: waiting(service) > of_first)
        service.go_on()
        assert (len(first.result()), len(second.result())) == (2000, 200)
    of_second = [size < 30 for size in itertools.chain.from_iterable(service.seen()[before:])]
    assert of_second.index(True) < len(of_second) / 2, "the second began long before the first ended"


@pytest.mark.parametrize("count", [7, 2000])
def test_nobody_works_for_who_left(service: Service, count: int) -> None:
    idle = service.seen()
    with ThreadPoolExecutor(1) as threads, service.held():
        first = threads.submit(service.rows, "the first")
        until(lambda: service.seen() != idle, what="the worker is at the first")
        before, tokens = service.seen(), waiting(service)
        with connect(service, {"input": ["gone soon"] * count}):
            until(lambda: under_way(service) > 1)
        until(lambda: waiting(service) == tokens, what="the service knows that the client left")
        service.go_on()
        first.result()
        until(lambda: under_way(service) == 0)
    assert sum(itertools.chain.from_iterable(service.seen()[len(before) :])) == 0
    assert "Traceback" not in service.log


def test_too_much_is_refused_at_once_and_the_rest_is_answered(service: Service) -> None:
    body = {"input": "word " * 40, "encoding_format": "base64"}

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits, trust_env=False) as client:
            asked = [asyncio.ensure_future(client.post("/v1/embeddings", json=body)) for _ in range(110)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert {each.result().status_code for each in done} == {503}
            service.go_on()
            return list(await asyncio.gather(*asked))

    with service.held():
        answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(answers) - len(refused) >= 64
    for answer in refused:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    assert service.rows("after").shape == (1, 64)


def _more_than(service: Service, tokens: float) -> bool:
    return waiting(service) > tokens


def test_of_many_large_requests_the_first_are_done_first(service: Service) -> None:
    done: list[int] = []

    def ask(number: int) -> None:
        service.rows(["the cat sat on the mat"] * 400)
        done.append(number)

    with ThreadPoolExecutor(6) as threads, service.held():
        for number in range(6):
            before = waiting(service)
            threads.submit(ask, number)
            until(partial(_more_than, service, before))
        service.go_on()
    assert sorted(done) == list(range(6))
    assert max(done.index(0), done.index(1)) < min(done.index(4), done.index(5))


@pytest.mark.parametrize("count", [1, 1000])
def test_a_piece_that_fails_fails_its_request_and_no_other(service: Service, count: int) -> None:
    with ThreadPoolExecutor(8) as threads:
        good = [threads.submit(service.rows, ["a mate"] * count) for _ in range(4)]
        bad = threads.submit(service.post, "/v1/embeddings", {"input": ["a"] * (count - 1) + [POISON]})
        assert all(len(each.result()) == count for each in good)
    assert bad.result().status_code == 500
    assert bad.result().json()["error"] == {
        "message": "the model gave no vector", "type": "server_error", "param": None, "code": "bad_vector",
    }  # fmt: skip
    until(lambda: under_way(service) == 0)


# the parts


def test_pieces_are_a_quarter_of_a_batch_unless_one_input_is_more() -> None:
    costs = [10, 20, 30, 70, 1, 1, 64, 300, 5]
    pieces = list(split(costs, BUDGET))
    assert [costs[start:end] for start, end in pieces] == [[10, 20, 30], [70], [1, 1], [64], [300], [5]]
    assert [end - start for start, end in split([0] * 130, BUDGET)] == [64, 64, 2]


def test_the_gate_lets_in_by_turns_and_forgets_who_gave_up() -> None:
    async def histories() -> list[str]:
        gate, seen = Gate(), list[str]()

        async def enter(name: str, size: float) -> None:
            await gate.enter(size, 10)
            seen.append(name)

        async def settle() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        await enter("too large, alone", 30)
        waiting = [asyncio.ensure_future(enter(name, size)) for name, size in (("a", 6), ("b", 6), ("c", 4), ("d", 4))]
        await settle()
        waiting[1].cancel()
        gate.leave(30)
        await settle()
        assert seen == ["too large, alone", "a", "c"]
        waiting[3].cancel()
        await settle()
        gate.leave(6)
        gate.leave(4)
        await enter("e", 10)
        return seen

    assert asyncio.run(histories())[-1] == "e"
