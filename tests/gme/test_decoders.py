"""Decoders are processes that may die: nobody else notices."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.embed.served import Service
from tests.gme.pictures import encoded, noise, uri
from tests.support import until


def decoders(gme: Service) -> set[int]:
    workers = gme.health()["handlers"]["decode"]["workers"]
    return {worker["pid"] for worker in workers if worker["state"] in ("ready", "busy")}


def test_decoders_have_bounds_and_nothing_else(gme: Service) -> None:
    for pid in decoders(gme):
        [limit] = re.findall(r"Max address space +(\d+)", Path(f"/proc/{pid}/limits").read_text())
        assert int(limit) < 3 << 30
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in libraries and "numpy" not in libraries


def test_a_killed_decoder_loses_no_request(gme: Service) -> None:
    """Every answer says that the pictures were decoded: their tokens, known only then, are more than is asked for."""
    given: list[Any] = ["a", *({"image": uri(encoded(noise(1500, 1000, seed), "JPEG"))} for seed in range(4))]
    over, answered = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            answer = gme.post("/v1/embeddings", {"input": given, "truncate_prompt_tokens": 100})
            answered.append((answer.status_code, answer.json()["error"]["code"]))

    def answers_come(count: int = 6) -> None:
        """Each client had one that it asked for after now: who was hit is through."""
        before = len(answered)
        until(lambda: len(answered) >= before + count, what="answers")

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        try:
            for _ in range(4):
                answers_come()
                os.kill(min(decoders(gme)), signal.SIGKILL)
            answers_come()
        finally:
            over.set()
        for each in asking:
            each.result()
    assert set(answered) == {(400, "context_length_exceeded")}
    assert gme.log.count("of decode on cpu: was killed by SIGKILL; starting another") == 4


def test_clients_that_leave_are_forgotten(gme: Service) -> None:
    given = [{"image": uri(encoded(noise(440, 440, seed)))} for seed in range(60)]
    with suppress(httpx.TimeoutException):
        gme.post("/v1/embeddings", {"input": given}, timeout=0.05)
    until(
        lambda: not any(each["queued"] + each["in_flight"] for each in gme.health()["handlers"].values()), what="rest"
    )
    assert np.isfinite(gme.rows(given[:1])).all()
