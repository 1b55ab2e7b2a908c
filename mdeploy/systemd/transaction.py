"""Changing the machine so that it can be undone: a step tells what it did, and takes it back when a later one fails.

A step is also its own description: `--dry-run` prints the very steps that a real run takes.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shlex
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mdeploy.errors import ConfigError
from mdeploy.specs import Say
from mdeploy.systemd.systemctl import Systemctl
from mdeploy.systemd.units import UnitFile

Undo = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do to the machine.

    `shell` is how a person would type it, `file` what is written by it. `take` does it and returns
    how to undo it, or None where nothing had to be changed.
    """

    shell: str
    take: Callable[[], Undo | None]
    file: UnitFile | None = None


class Transaction:
    """Takes steps; at any failure, an interrupt included, undoes those that were taken, the last one first.

    `after_rollback` is called once all is as it was, for whoever must look again.
    """

    def __init__(self, say: Say, after_rollback: Callable[[], object]) -> None:
        self._say, self._after = say, after_rollback
        self._undos: list[Undo] = []

    def take(self, step: Step) -> bool:
        """Take one step; True where it changed something."""
        undo = step.take()
        if undo is not None:
            self._undos.append(undo)
        return undo is not None

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None or not self._undos:
            return
        self._say("it failed: taking back what was changed")
        with undisturbed():
            for undo in (*reversed(self._undos), self._after):
                try:
                    undo()
                except Exception as problem:  # whatever it is, the others are still to be undone
                    self._say(f"warning: could not be taken back: {str(problem) or type(problem).__name__}")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C while things are taken back would leave them half taken back: let it pass.

    By handlers of our own, because what is ignored stays ignored in the programs that are started here.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, lambda number, frame: None)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


# files


def write(file: UnitFile) -> Step:
    """Write a file atomically, with the directories above it."""
    path = Path(file.path)

    def take() -> Undo | None:
        before = _content(path)
        if before is not None and before == (file.content.encode(), file.mode):
            return None
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, file.content.encode(), file.mode)
        return lambda: _restore(path, before, made)

    return Step(f"cat > {shlex.quote(file.path)}", take, file)


def remove(path: Path) -> Step:
    """Remove a file, and the directory it was alone in."""

    def take() -> Undo | None:
        before = _content(path)
        if before is None:
            return None
        _restore(path, None, [path.parent])

        def undo() -> None:
            path.parent.mkdir(exist_ok=True)
            _restore(path, before, ())

        return undo

    return Step(f"rm {shlex.quote(str(path))}", take)


def remove_empty(*paths: Path) -> Step:
    """Remove directories that nothing is in any more."""

    def take() -> Undo | None:
        for path in paths:
            with contextlib.suppress(OSError):  # it is in use, or was never made
                path.rmdir()
        return None

    return Step(shlex.join(["rmdir", "--ignore-fail-on-non-empty", *map(str, paths)]), take)


def _content(path: Path) -> tuple[bytes, int] | None:
    try:
        return path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint=f"ls -ld {path.parent}; df {path.parent}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _restore(path: Path, before: tuple[bytes, int] | None, made: Sequence[Path]) -> None:
    if before is not None:
        _replace(path, *before)
        return
    path.unlink(missing_ok=True)
    for directory in made:
        with contextlib.suppress(OSError):  # another service's file is in it
            directory.rmdir()


# ownership


@dataclass(frozen=True, slots=True)
class Owner:
    """Who a path is given to; None leaves that part as it is."""

    user: str | None = None
    group: str | None = None
    mode: int | None = None


def own(path: Path, to: Owner, *, create: bool = False) -> Step:
    """Give a file or directory to somebody; one that is missing is created empty or left out.

    Names are looked up when the step is taken: an earlier one may have made the user.
    """
    words = [f"touch {shlex.quote(str(path))}"] if create else []
    if to.user or to.group:
        words.append(f"chown {to.user or ''}{':' + to.group if to.group else ''} {shlex.quote(str(path))}")
    if to.mode is not None:
        words.append(f"chmod {to.mode:o} {shlex.quote(str(path))}")
    return Step(" && ".join(words), lambda: _own(path, to, create))


def _own(path: Path, to: Owner, create: bool) -> Undo | None:
    with _opened(path, create) as fd:
        if fd is None:
            return None
        before = _rights(fd)
        after = _wanted(to, before)
        if after == before:
            return None
        _give(fd, after)
    return lambda: _give_back(path, before)


def _wanted(to: Owner, before: tuple[int, int, int]) -> tuple[int, int, int]:
    try:
        user = pwd.getpwnam(to.user).pw_uid if to.user else before[0]
        group = grp.getgrnam(to.group).gr_gid if to.group else before[1]
    except KeyError as error:
        raise ConfigError(f"{to.user}:{to.group}: {error.args[0]}", hint="getent passwd; getent group") from error
    return user, group, to.mode if to.mode is not None else before[2]


def _give_back(path: Path, rights: tuple[int, int, int]) -> None:
    with _opened(path, create=False) as fd:
        if fd is not None:
            _give(fd, rights)


@contextlib.contextmanager
def _opened(path: Path, create: bool) -> Iterator[int | None]:
    """A file or directory itself, never what a link points to: a less trusted user may write beside it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        yield None
        return
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode) and os.fstat(fd).st_nlink > 1:
            raise ConfigError(f"{path} has another name (a hard link) and is not given away", hint=f"rm {path}")
        yield fd
    finally:
        os.close(fd)


def _rights(fd: int) -> tuple[int, int, int]:
    seen = os.fstat(fd)
    return seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)


def _give(fd: int, rights: tuple[int, int, int]) -> None:
    os.fchown(fd, rights[0], rights[1])
    os.fchmod(fd, rights[2])  # after the owner: a change of owner clears set-id bits


# commands


def command(*words: str, undo: Sequence[str] = ()) -> Step:
    """Run a command; a failure becomes an error with its last line. With `undo` it counts as a change."""

    def take() -> Undo | None:
        run(words)
        return (lambda: run(undo)) if undo else None

    return Step(shlex.join(words), take)


def run(words: Sequence[str]) -> None:
    """Run a command for its effect. Raises ConfigError."""
    try:
        done = subprocess.run(  # in a session of its own: a Ctrl-C is ours to act upon
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, start_new_session=True
        )
    except OSError as error:
        raise ConfigError(f"{words[0]} cannot be run: {error.strerror}", hint="install systemd's own tools") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it failed"]
        raise ConfigError(f"{shlex.join(words)}: {lines[-1]}")


def verb(systemctl: Systemctl, *words: str) -> Step:
    """A verb of systemctl that needs no undoing, as daemon-reload."""

    def take() -> Undo | None:
        systemctl.run(*words)
        return None

    return Step(shlex.join([*systemctl.command, *words]), take)


def enable(systemctl: Systemctl, unit: str) -> Step:
    """Have a unit started at boot."""

    def take() -> Undo | None:
        if systemctl.asks("is-enabled", unit) == "enabled":
            return None
        systemctl.run("enable", unit)
        return verb(systemctl, "disable", unit).take

    return Step(shlex.join([*systemctl.command, "enable", unit]), take)
