"""The log of a service, wherever it is kept: in our own files, or in systemd's journal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from mdeploy.errors import ConfigError
from mdeploy.supervise import tail
from mdeploy.supervise.state import ServiceFiles
from mdeploy.systemd import journal, manager
from mdeploy.systemd.manager import Unit

_TAKE_OVER_S = 5.0
"""What a guard gets to take the place of its supervisor."""

_ASK_S = 1.0
"""How often systemd is asked whether a unit is active."""


def read(files: ServiceFiles, query: tail.Query, *, follow: bool) -> Iterator[list[bytes]]:
    """Lines of a log, stamped, in batches; with `follow` until the service ends.

    Raises ConfigError for a journal that the caller may not read.
    """
    unit = manager.find(files.home, files.name)
    if unit is not None:
        return _from_journal(unit, query, follow=follow)
    return tail.read(files.log, query, _goes_on(files) if follow else None)


def _goes_on(files: ServiceFiles) -> Callable[[], bool]:
    """Whether a service has not ended. One whose supervisor was killed gets the time its guard needs."""
    seen = time.monotonic()

    def goes_on() -> bool:
        nonlocal seen
        if files.is_supervised():
            seen = time.monotonic()
            return True
        record = files.record()
        is_over = record is None or record.phase in ("stopped", "failed")
        return not is_over and time.monotonic() - seen < _TAKE_OVER_S

    return goes_on


def _from_journal(unit: Unit, query: tail.Query, *, follow: bool) -> Iterator[list[bytes]]:
    """journalctl finds the time and the number of lines; a pattern is ours: it may have been built without."""
    wanted, start, cursor = tail.Filter(query), time.time(), ""

    def past() -> Iterator[list[bytes]]:
        nonlocal cursor
        for batch in journal.past(unit, query.since, None if query.pattern else query.count):
            cursor = batch[-1].cursor if batch else cursor
            yield wanted.of([entry.line for entry in batch])

    yield from tail.last(past(), query.count)
    if not cursor and not follow and os.geteuid() != 0:
        hint = f"sudo mdeploy logs {unit.service}, or join the group systemd-journal"
        raise ConfigError(f"the journal shows you nothing of {unit.name}", hint=hint)
    if follow:
        for batch in journal.following(unit, cursor, start, _is_active(unit)):
            yield wanted.of([entry.line for entry in batch])


def _is_active(unit: Unit) -> Callable[[], bool]:
    asked, answer = float("-inf"), True

    def is_active() -> bool:
        nonlocal asked, answer
        if time.monotonic() - asked > _ASK_S:
            asked, answer = time.monotonic(), manager.is_active(unit)
        return answer

    return is_active
