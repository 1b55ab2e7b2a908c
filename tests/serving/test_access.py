"""The access log never costs a request: written soon, all of it at the end, and given up when nobody reads."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from mdeploy.serving.access import Access, AccessLog

LINE = Access(1795281039.0625, "id-1", "POST", '/a"\udcff', 200, 0.0125, 3, 4, "127.0.0.1", "echo", 0.5)


def test_lines_come_within_a_second_or_at_the_end() -> None:
    reader, writer = os.pipe()
    log = AccessLog(writer)

    async def run() -> bytes:
        log.add(LINE)
        first = await asyncio.get_running_loop().run_in_executor(None, os.read, reader, 1000)
        log.add(LINE)
        log.flush()
        return first + os.read(reader, 1000)

    lines = asyncio.run(run()).decode().splitlines()
    assert len(lines) == 2
    found = json.loads(lines[0])
    assert (found["time"], found["ms"], found["wait_ms"]) == ("2026-11-21T17:10:39.062Z", 12.5, 500.0)
    for end in (reader, writer):
        os.close(end)


def test_a_reader_that_is_gone_does_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = AccessLog(writer)

    async def run() -> None:
        for _ in range(3):
            log.add(LINE)
            log.flush()

    asyncio.run(run())
    assert capsys.readouterr().err.count("the access log ends: Broken pipe") == 1
    os.close(writer)
