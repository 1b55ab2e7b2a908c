"""Logs stay small, say when, and neither a disk nor a hand in them stops an engine."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest

from mdeploy.supervise import tail
from mdeploy.supervise.logs import LINE_BYTES, LogWriter, Pump, stamp

NOON = 1795435200.123  # 2026-11-23T12:00:00.123Z
STAMPED = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


def _texts(path: Path) -> list[bytes]:
    """The lines of one file without their stamps, each of which is checked."""
    lines = path.read_bytes().splitlines()
    assert all(STAMPED.match(line) for line in lines)
    return [tail.split(line)[1] for line in lines]


def _total(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _pumped(path: Path, data: bytes, limit: int = 1 << 20) -> Pump:
    """A pump that has carried `data` and is done."""
    source, sink = os.pipe()
    writer = LogWriter(path, limit, 3)
    with os.fdopen(source, "rb") as reader, os.fdopen(sink, "wb") as engine:
        pump = Pump(reader, writer, None)
        pump.start()
        engine.write(data)
        engine.close()
        pump.join(30)
        assert not pump.is_alive()
    writer.close()
    return pump


def test_a_line_says_when_it_was_written(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", 1000, 3, clock=lambda: NOON)
    writer.write(b"hello\n")
    writer.note("the engine ended\nagain")
    writer.close()
    assert (tmp_path / "log").read_bytes().splitlines() == [
        b"2026-11-23T12:00:00.123Z hello",
        b"2026-11-23T12:00:00.123Z mdeploy: the engine ended",
        b"2026-11-23T12:00:00.123Z mdeploy: again",
    ]
    assert stamp(NOON - 1e-3) < stamp(NOON)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_rotation_keeps_so_many_private_files(tmp_path: Path, keep: int) -> None:
    writer = LogWriter(tmp_path / "log", 100, keep)
    for number in range(100):
        writer.write(b"line %03d\n" % number)
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1", "log.2", "log.3"][: keep + 1]
    assert all(p.stat().st_size <= 100 and p.stat().st_mode & 0o777 == 0o600 for p in tmp_path.iterdir())
    assert _texts(tmp_path / "log")[-1] == b"line 099"


def test_fewer_files_than_before_remove_the_surplus(tmp_path: Path) -> None:
    for number in range(1, 6):
        (tmp_path / f"log.{number}").touch()
    writer = LogWriter(tmp_path / "log", 10, 1)
    writer.write(b"one")
    writer.write(b"two")
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1"]


def test_an_endless_line_and_an_endless_progress_bar_are_bounded(tmp_path: Path) -> None:
    for name, data in (("line", b"x" * (1 << 20)), ("bar", b"\r 10% |#####" * 100_000)):
        directory = tmp_path / name
        directory.mkdir()
        _pumped(directory / "log", data, limit=100_000)
        assert _total(directory) <= 4 * 100_000
        assert max(map(len, _texts(directory / "log"))) <= LINE_BYTES


def test_a_bar_ends_its_lines_with_returns(tmp_path: Path) -> None:
    pump = _pumped(tmp_path / "log", b"one\r\n\r\ntwo\n\rload 10%\rload 90%\r\r\nthree")
    assert _texts(tmp_path / "log") == [b"one", b"", b"two", b"load 10%", b"load 90%", b"three"]
    assert pump.lines() == ["one", "", "two", "load 10%", "load 90%", "three"]


def test_the_tail_for_a_diagnosis_has_no_stamps_and_no_notes(tmp_path: Path) -> None:
    source, sink = os.pipe()
    seen: list[bytes] = []
    with os.fdopen(source, "rb") as reader, os.fdopen(sink, "wb", 0) as engine:
        pump = Pump(reader, None, seen.append)
        pump.note("starting")
        pump.start()
        engine.write(b"RuntimeError: no\n")
        engine.close()
        pump.join(30)
    assert pump.lines() == ["RuntimeError: no"]
    assert seen == [b"mdeploy: starting\n", b"RuntimeError: no\n"]


def test_a_removed_a_moved_and_an_emptied_log_go_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, 1000, 3)
    writer.write(b"one")
    path.unlink()
    writer.write(b"two")
    assert _texts(path) == [b"two"]
    path.rename(tmp_path / "elsewhere")
    writer.write(b"three")
    assert _texts(path) == [b"three"]
    os.truncate(path, 0)
    writer.write(b"four")
    writer.close()
    assert _texts(path) == [b"four"]


def test_a_link_or_a_pipe_in_the_place_of_the_log_is_not_written_to(tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "log"
    precious.write_text("mine")
    path.symlink_to(precious)
    writer = LogWriter(path, 1000, 3)
    writer.write(b"one")
    assert (precious.read_text(), _texts(path)) == ("mine", [b"one"])
    path.unlink()
    os.mkfifo(path)
    writer.write(b"two")
    writer.close()
    assert _texts(path) == [b"two"]


def test_a_line_that_a_power_cut_tore_does_not_eat_the_next(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"half a li")
    writer = LogWriter(tmp_path / "log", 1000, 3)
    writer.write(b"whole")
    writer.close()
    first, second = (tmp_path / "log").read_bytes().splitlines()
    assert (first, tail.split(second)[1]) == (b"half a li", b"whole")


def test_a_directory_that_is_gone_loses_lines_and_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    writer = LogWriter(directory / "log", 10, 3)
    writer.write(b"0123456789")
    shutil.rmtree(directory)
    for _ in range(3):
        writer.write(b"lost")
    directory.mkdir()
    writer.write(b"kept")
    writer.close()
    lost, kept = directory / "log.1", directory / "log"
    assert _texts(lost) == [b"mdeploy: 3 lines were lost: No such file or directory"]
    assert _texts(kept) == [b"kept"]


def test_a_log_that_cannot_be_rotated_is_emptied_instead(tmp_path: Path) -> None:
    """A directory in the place of log.1 stands for every reason a rename may fail for, also as root."""
    path = tmp_path / "log"
    (tmp_path / "log.1" / "full").mkdir(parents=True)
    writer = LogWriter(path, 100, 1)
    for number in range(100):
        writer.write(b"line %03d" % number)
        assert path.stat().st_size <= 100
    writer.close()
    assert _texts(path)[-1] == b"line 099"


def test_a_full_disk_drains_the_engine_and_tells_of_the_loss(tmp_path: Path) -> None:
    """A limit on the size of files is a disk that is full: write() comes back short, then fails."""
    path = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = LogWriter(path, 1 << 20, 3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for _ in range(100):
            writer.write(b"x" * 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.stat().st_size == 1000
    writer.write(b"again")
    writer.close()
    *whole, torn, note, last = path.read_bytes().splitlines()
    assert all(len(line) == len(whole[0]) for line in whole)
    assert len(torn) < len(whole[0])
    assert tail.split(note)[1] == b"mdeploy: %d lines were lost: File too large" % (100 - len(whole))
    assert tail.split(last)[1] == b"again"


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", 2000, 1000)

    def work(letter: bytes) -> None:
        for number in range(200):
            writer.write(letter * 20 + b" %d" % number)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    lines = [line for batch in tail.read(tmp_path / "log", tail.Query()) for line in batch]
    texts = [tail.split(line)[1] for line in lines]
    for letter in (b"a", b"b", b"c"):
        assert [t for t in texts if t.startswith(letter)] == [letter * 20 + b" %d" % n for n in range(200)]
