"""Logs stay small, and a reader misses nothing when they rotate."""

from __future__ import annotations

from pathlib import Path

from mdeploy.supervise.logs import LogWriter, read


def test_rotation_keeps_three_old_files(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", limit=100)
    for number in range(100):
        writer.write(b"line %03d\n" % number)
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1", "log.2", "log.3"]
    assert all(p.stat().st_size < 120 and p.stat().st_mode & 0o777 == 0o600 for p in tmp_path.iterdir())
    assert b"".join(read(tmp_path / "log", 5)) == b"".join(b"line %03d\n" % n for n in range(95, 100))


def test_the_tail_reaches_into_the_rotated_file(tmp_path: Path) -> None:
    (tmp_path / "log.1").write_bytes(b"a\nb\nc\n")
    (tmp_path / "log").write_bytes(b"d\n")
    assert b"".join(read(tmp_path / "log", 3)) == b"b\nc\nd\n"
    assert b"".join(read(tmp_path / "log", 0)) == b""
    assert b"".join(read(tmp_path / "nothing", 3)) == b""


def test_following_across_rotations_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, limit=100)
    writer.write(b"before\n")
    numbers = iter(range(60))

    def alive() -> bool:
        number = next(numbers, None)
        if number is not None:
            writer.write(b"line %03d\n" % number)
        return number is not None

    seen = b"".join(read(path, 10, alive, poll_s=0.001))
    assert seen == b"before\n" + b"".join(b"line %03d\n" % n for n in range(60))
    writer.close()
