"""Reading the log of a service that systemd keeps: the journal's entries as lines like those of our own log."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import IO, Any

from mdeploy.systemd.manager import Unit, journal_command

_ENTRIES = 256
_POLL_S, _QUIET_S = 0.2, 1.0
"""How often somebody asks whether the unit is active; how long the journal gets for its last words."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: a place to go on from, and `TIMESTAMP text` in UTC."""

    cursor: str
    line: bytes


def past(unit: Unit, since: float | None, lines: int | None) -> Iterator[list[Entry]]:
    """What the journal has, oldest first, in batches."""
    with _reading(unit, journal_command(unit, since, lines, output="json")) as process:
        assert process.stdout is not None
        batch: list[Entry] = []
        for text in process.stdout:
            batch += _entries(text)
            if len(batch) >= _ENTRIES:
                yield batch
                batch = []
        yield batch


def following(unit: Unit, cursor: str, since: float, alive: Callable[[], bool]) -> Iterator[list[Entry]]:
    """What comes after a cursor (or since a Unix time, where there is none), until `alive` says no and all is read."""
    start = [f"--after-cursor={cursor}"] if cursor else [f"--since=@{since:.6f}"]
    command = [*journal_command(unit, None, None, follow=True, output="json"), *start]
    with _reading(unit, command) as process:
        try:
            assert process.stdout is not None
            yield from _batches(process.stdout, alive)
        finally:
            process.terminate()


def _batches(journal: IO[bytes], alive: Callable[[], bool]) -> Iterator[list[Entry]]:
    partial, heard = b"", time.monotonic()
    while True:
        going = alive()
        if select.select([journal], [], [], _POLL_S)[0]:
            data = os.read(journal.fileno(), 1 << 16)
            *whole, partial = (partial + data).split(b"\n")
            yield [entry for text in whole for entry in _entries(text)]
            if not data:
                return
            heard = time.monotonic()
        elif not going and time.monotonic() - heard > _QUIET_S:
            return


def _reading(unit: Unit, command: list[str]) -> subprocess.Popen[bytes]:
    fields = "--output-fields=MESSAGE,SYSLOG_IDENTIFIER"
    env = unit.systemctl.environment()
    return subprocess.Popen([*command, "--all", fields], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def _entries(text: bytes) -> list[Entry]:
    """The lines of one entry; systemd's own are marked as ours are."""
    import orjson

    if not text.strip():
        return []
    found = orjson.loads(text)
    when = datetime.fromtimestamp(int(found["__REALTIME_TIMESTAMP"]) / 1e6, timezone.utc)
    stamp = when.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()
    speaker = b"systemd: " if found.get("SYSLOG_IDENTIFIER") == "systemd" else b""
    lines = _bytes(found.get("MESSAGE")).split(b"\n")
    return [Entry(str(found["__CURSOR"]), b"%s %s%s" % (stamp, speaker, line)) for line in lines]


def _bytes(message: Any) -> bytes:
    """A message is a text, or a list of bytes where it is none; null where it was too large for the journal."""
    if isinstance(message, list):
        return bytes(message)
    return str(message if message is not None else "(a line that the journal did not keep)").encode()
