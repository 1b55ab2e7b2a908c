"""Reading a log: its end, a part of it, what follows, whatever happens to the files meanwhile."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdeploy.errors import UsageError
from mdeploy.supervise.logs import LogWriter
from mdeploy.supervise.tail import Query, compile_pattern, parse_since, read, split

NOON = 1795435200.0  # 2026-11-23T12:00:00Z


def _read(path: Path, alive: Callable[[], bool] | None = None, **query: object) -> list[bytes]:
    batches = read(path, Query(**query), alive, poll_s=0.001)  # type: ignore[arg-type]
    return [split(line)[1] for batch in batches for line in batch]


def _steps(*actions: Callable[[], object]) -> Callable[[], bool]:
    """A service that does one thing each time somebody looks whether it lives, and then ends."""
    left = iter(actions)

    def alive() -> bool:
        action = next(left, None)
        if action:
            action()
        return action is not None

    return alive


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LogWriter]:
    """Writes one line a second from noon on, two to a file, and keeps three files."""
    seconds = iter(range(10**6))
    writer = LogWriter(tmp_path / "log", 70, 3, clock=lambda: NOON + next(seconds))
    yield writer
    writer.close()


def _write(writer: LogWriter, numbers: range) -> None:
    for number in numbers:
        writer.write(b"line %03d" % number)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _lines(numbers: range) -> list[bytes]:
    return [b"line %03d" % number for number in numbers]


def test_the_tail_reaches_into_all_rotated_files(tmp_path: Path, writer: LogWriter) -> None:
    _write(writer, range(20))
    path = tmp_path / "log"
    assert len(list(tmp_path.iterdir())) == 4
    assert _read(path, count=3) == _lines(range(17, 20))
    assert _read(path, count=0) == []
    assert _read(path) == _read(path, count=99) == _lines(range(12, 20))
    assert _read(tmp_path / "nothing", count=3) == []
    assert _read(tmp_path / "nowhere" / "log") == []


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 5000])
def test_the_tail_of_a_log_of_many_blocks(tmp_path: Path, count: int) -> None:
    (tmp_path / "log.1").write_bytes(b"".join(b"%0300d\n" % n for n in range(1000)))
    (tmp_path / "log").write_bytes(b"".join(b"%0300d\n" % n for n in range(1000, 2000)) + b"no end")
    expected = [*(b"%0300d" % n for n in range(2000)), b"no end"][-count:]
    assert _read(tmp_path / "log", count=count) == expected


def test_since_and_grep_look_into_all_files(tmp_path: Path, writer: LogWriter) -> None:
    _write(writer, range(20))
    path = tmp_path / "log"
    assert _read(path, since=NOON + 15) == _lines(range(15, 20))
    assert _read(path, since=NOON + 14.5) == _lines(range(15, 20))
    assert _read(path, pattern=re.compile("[24]$")) == [b"line 012", b"line 014"]
    assert _read(path, pattern=re.compile("[24]$"), count=1) == [b"line 014"]
    assert _read(path, since=NOON + 13, pattern=re.compile("[24]$"), count=5) == [b"line 014"]
    assert _read(path, pattern=re.compile("^2026")) == []  # the stamp is not the text


def test_lines_of_an_earlier_version_have_no_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old\n2026-11-23T12:00:00.000Z new\n  of the same time\n")
    assert _read(path) == [b"old", b"new", b"  of the same time"]
    assert _read(path, since=NOON) == [b"new", b"  of the same time"]
    assert _read(path, since=NOON + 1) == []


def test_following_loses_no_line_to_rotations(tmp_path: Path, writer: LogWriter) -> None:
    writer.write(b"before")
    steps = [lambda n=n: _write(writer, range(n * 5, n * 5 + 5)) for n in range(40)]
    seen = _read(tmp_path / "log", _steps(*steps), count=10)
    assert seen == [b"before", *_lines(range(200))]


def test_following_a_log_that_is_emptied_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    alive = _steps(
        lambda: None,
        lambda: os.truncate(path, 0),
        lambda: _append(path, b"four\nfi"),
        lambda: _append(path, b"ve\n"),
    )
    assert _read(path, alive, count=2) == [b"two", b"four", b"five"]


def test_following_a_log_that_is_removed_goes_on_in_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    (tmp_path / "log.1").write_bytes(b"old\n")
    path.write_bytes(b"one\n")
    alive = _steps(
        path.unlink, lambda: None, lambda: path.write_bytes(b"two\n"), path.unlink, lambda: path.write_bytes(b"three")
    )
    assert _read(path, alive) == [b"old", b"one", b"two", b"three"]


def test_following_begins_before_there_is_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    alive = _steps(lambda: None, lambda: path.write_bytes(b"one\n"))
    assert _read(path, alive, count=0) == [b"one"]


def test_following_a_filter(tmp_path: Path, writer: LogWriter) -> None:
    _write(writer, range(4))
    alive = _steps(lambda: _write(writer, range(4, 8)))
    assert _read(tmp_path / "log", alive, count=1, pattern=re.compile("[135]$")) == [b"line 003", b"line 005"]


def test_an_endless_line_is_handed_out_in_parts(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 5_000_000)
    parts = _read(tmp_path / "log")
    assert sum(map(len, parts)) == 5_000_000
    assert max(map(len, parts)) < 1_200_000


@pytest.mark.parametrize(
    ("text", "unix"),
    [
        ("90s", NOON - 90),
        ("10m", NOON - 600),
        ("1d2h", NOON - 26 * 3600),
        ("2026-11-23T11:00Z", NOON - 3600),
        ("2026-11-23 19:00:00+08:00", NOON - 3600),
    ],
)
def test_since(text: str, unix: float) -> None:
    assert parse_since(text, NOON) == unix


def test_since_without_an_offset_is_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert parse_since("2026-11-23 19:00", NOON) == NOON - 3600
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text", ["", "yesterday", "10", "-5m", "10 m", "9" * 400 + "d", "2026-13-01", "0001-01-01T00:00", "٣m"]
)
def test_since_nonsense(text: str) -> None:
    if text.startswith("0001"):
        assert parse_since(text + "Z", NOON) < 0  # long ago, and still a time
        return
    with pytest.raises(UsageError, match="is no time") as caught:
        parse_since(text, NOON)
    assert "10m" in caught.value.hint


def test_since_the_future() -> None:
    with pytest.raises(UsageError, match="lies in the future"):
        parse_since("2027-01-01", NOON)


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        compile_pattern("(")
