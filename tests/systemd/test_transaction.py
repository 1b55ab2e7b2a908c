"""Steps are undone in reverse when a later one fails, and say beforehand what they would do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError, MdeployError
from mdeploy.systemd.transaction import Owner, Step, Transaction, command, own, remove, remove_empty, write
from mdeploy.systemd.units import UnitFile


def _fail() -> None:
    raise MdeployError("a later step fails")


def _take(*steps: Step, fails: bool) -> tuple[list[bool], list[str]]:
    said: list[str] = []
    changed: list[bool] = []
    with Transaction(said.append, lambda: said.append("as before")) as transaction:
        changed += [transaction.take(step) for step in steps]
        if fails:
            transaction.take(Step("false", _fail))
    return changed, said


def _rolled_back(*steps: Step) -> None:
    with pytest.raises(MdeployError, match="a later step fails"):
        _take(*steps, fails=True)


def test_a_file_and_the_directories_made_for_it_are_removed_again(tmp_path: Path) -> None:
    file = UnitFile(str(tmp_path / "a/b/unit"), "text\n", 0o640)
    _rolled_back(write(file))
    assert list(tmp_path.iterdir()) == []
    assert _take(write(file), write(file), fails=False) == ([True, False], [])
    assert Path(file.path).read_text() == "text\n"
    assert Path(file.path).stat().st_mode & 0o777 == 0o640


def test_a_file_that_was_there_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    path.write_text("old")
    path.chmod(0o600)
    _rolled_back(write(UnitFile(str(path), "new")), remove(path))
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("old", 0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["unit"]


def test_a_removed_file_takes_its_empty_directory_along(tmp_path: Path) -> None:
    path = tmp_path / "x.d/conf"
    path.parent.mkdir()
    path.write_text("x")
    _rolled_back(remove(path))
    assert path.read_text() == "x"
    (path.parent / "another").touch()
    assert _take(remove(path), remove(path), fails=False)[0] == [True, False]
    assert [p.name for p in path.parent.iterdir()] == ["another"]
    assert _take(remove_empty(path.parent, tmp_path / "never"), fails=False)[0] == [False]
    assert path.parent.is_dir()


def test_undoing_goes_backwards_and_on_after_a_failure(tmp_path: Path) -> None:
    said: list[str] = []

    def broken() -> None:
        raise OSError("cannot")

    with pytest.raises(MdeployError), Transaction(said.append, lambda: said.append("as before")) as transaction:
        for name, undo in (
            ("first", lambda: said.append("first")),
            ("broken", broken),
            ("last", lambda: said.append("last")),
        ):
            transaction.take(Step(name, lambda undo=undo: undo))  # type: ignore[misc]
        _fail()
    assert said == [
        "it failed: taking back what was changed",
        "last",
        "warning: could not be taken back: cannot",
        "first",
        "as before",
    ]


def test_nothing_changed_nothing_undone() -> None:
    said: list[str] = []
    with pytest.raises(MdeployError), Transaction(said.append, lambda: said.append("as before")) as transaction:
        transaction.take(Step("true", lambda: None))
        _fail()
    assert said == []


def test_an_interrupt_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    with pytest.raises(KeyboardInterrupt), Transaction(lambda text: None, lambda: None) as transaction:
        transaction.take(write(UnitFile(str(path), "x")))
        raise KeyboardInterrupt
    assert not path.exists()


def test_a_second_interrupt_does_not_leave_things_half_taken_back() -> None:
    said: list[str] = []

    def interrupted() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        raise KeyError("no such user")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Transaction(said.append, lambda: said.append("as before")) as transaction:
        transaction.take(Step("first", lambda: lambda: said.append("first")))
        transaction.take(Step("second", lambda: interrupted))
        raise KeyboardInterrupt
    assert said[1:] == ["warning: could not be taken back: 'no such user'", "first", "as before"]
    assert signal.getsignal(signal.SIGINT) is before


def test_nobody_is_given_to_whom_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody-knows-me"):
        own(tmp_path, Owner("nobody-knows-me")).take()


def test_modes_are_given_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    _rolled_back(own(path, Owner(mode=0o644)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert _take(own(path, Owner(mode=0o644)), own(path, Owner(mode=0o644)), fails=False)[0] == [True, False]
    assert _take(own(tmp_path / "missing", Owner(mode=0o644)), fails=False)[0] == [False]
    assert _take(own(tmp_path / "lock", Owner(mode=0o660), create=True), fails=False)[0] == [True]
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o660


def test_what_a_link_points_to_is_never_given_away(tmp_path: Path) -> None:
    """The service can write to the directory its state is in: it must not make root chown another file."""
    target = tmp_path / "target"
    target.touch(0o600)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "hard").hardlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        own(tmp_path / "link", Owner(mode=0o777)).take()
    with pytest.raises(ConfigError, match="hard link"):
        own(tmp_path / "hard", Owner(mode=0o777)).take()
    os.mkfifo(tmp_path / "pipe", 0o600)
    own(tmp_path / "pipe", Owner(mode=0o600)).take()  # and does not wait for a writer
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(ConfigError, match="sh -c 'echo no good >&2; exit 3': no good"):
        command("sh", "-c", "echo no good >&2; exit 3").take()
    with pytest.raises(ConfigError, match="cannot be run"):
        command("/nonexistent/program").take()


def test_steps_read_as_a_shell_would_take_them(tmp_path: Path) -> None:
    assert own(Path("/a b"), Owner("root", "x", 0o1775)).shell == "chown root:x '/a b' && chmod 1775 '/a b'"
    assert own(Path("/l"), Owner("r", "g", 0o660), create=True).shell == "touch /l && chown r:g /l && chmod 660 /l"
    assert remove(Path("/a b")).shell == "rm '/a b'"
