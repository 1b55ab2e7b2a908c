"""The files of a service, and what is true now.

A supervisor holds the lock for as long as it lives; the kernel lets go of it at any death.
So a record says what was, the lock says whether anybody is still there to keep it true.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mdeploy.errors import AlreadyRunningError, ConfigError, NotFoundError, UsageError
from mdeploy.paths import Paths
from mdeploy.specs import Limits, Phase, Probe, ServiceRecord, ServiceSpec, ServiceStatus, from_json, to_json
from mdeploy.supervise import processes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LOCK_TRIES, _LOCK_PAUSE_S = 50, 0.02
_PUBLIC = 0o644
"""Mode of what holds no secret: whoever may enter the directory may read it. Other files are private."""

_ACTIVE = ("starting", "ready", "unhealthy", "stopping")


def check_name(name: str) -> str:
    """A service name is a directory and a systemd instance name: raises UsageError for others."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no service name", hint="letters, digits, '.', '_' and '-', at most 63")
    return name


def make_private(directory: Path) -> None:
    """Make a directory only its owner can enter. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        hint = "set MDEPLOY_HOME to a directory you may write"
        raise ConfigError(f"cannot create {directory}: {error.strerror}", hint=hint) from error


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Readers see the old file or the new one, never half of one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        # exclusive: in a directory that others may write to, nobody can point it somewhere else
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), mode)
            _keep_owner(path, file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint=f"df -h {path.parent}") from error


def _keep_owner(path: Path, fd: int) -> None:
    """What root replaces stays its owner's: a service under a user of its own must write it again."""
    if os.geteuid() == 0:
        with contextlib.suppress(FileNotFoundError):
            owner = path.lstat()
            os.fchown(fd, owner.st_uid, owner.st_gid)


@dataclasses.dataclass(frozen=True, slots=True)
class Segments:
    """Files in /dev/shm: those that were there before a run, and those it was seen to use."""

    before: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()

    def ours(self, more: frozenset[str] = frozenset()) -> frozenset[str]:
        """What the run made: seen (with `more`), and not there before."""
        return (self.seen | more) - self.before


class ServiceFiles:
    """One service's directory: spec, record, lock, log."""

    def __init__(self, paths: Paths, name: str) -> None:
        self.name = check_name(name)
        self.home = paths.home
        self.directory = paths.service(name)
        self.log = self.directory / "log"

    def create(self) -> None:
        """Make the private directory."""
        make_private(self.directory)

    def spec(self) -> ServiceSpec:
        """What to run. Raises NotFoundError for an unknown service."""
        path = self.directory / "spec.json"
        try:
            return from_json(ServiceSpec, _read(path))
        except FileNotFoundError as error:
            raise NotFoundError(f"no service {self.name!r}", hint="mdeploy ps lists the services") from error
        except ValueError as error:
            hint = "serve it again to write a new one"
            raise ConfigError(f"{path} was written by another version or is damaged", hint=hint) from error

    def check_writable(self) -> None:
        """Raises ConfigError where a supervisor could not write its record: a full disk, another user's directory."""
        if os.access(self.directory, os.W_OK):
            path = self.directory / ".probe"
            write_atomically(path, b"x" * 4096)
            path.unlink()

    def write_spec(self, spec: ServiceSpec) -> None:
        """Replace the spec."""
        self.create()
        write_atomically(self.directory / "spec.json", to_json(spec), _PUBLIC)

    def record(self) -> ServiceRecord | None:
        """What a supervisor last wrote; None before the first start or where it cannot be read."""
        try:
            return from_json(ServiceRecord, _read(self.directory / "state.json"))
        except (OSError, ValueError):
            return None

    def check_owner(self) -> None:
        """Raises ConfigError for a record that another user wrote: its pids must never be signalled for them."""
        with contextlib.suppress(FileNotFoundError):
            uid = (self.directory / "state.json").lstat().st_uid
            if uid != os.geteuid():
                hint = f"act as that user, or where it is a unit: systemctl stop mdeploy@{self.name}"
                raise ConfigError(f"the record of {self.name} belongs to user {uid}", hint=hint)

    def write_record(self, record: ServiceRecord) -> None:
        """Replace the record."""
        write_atomically(self.directory / "state.json", to_json(record), _PUBLIC)

    def settle(self, record: ServiceRecord) -> None:
        """Write that a service is stopped. A full disk has no place for that: then no record says the same."""
        stopped = dataclasses.replace(record, phase="stopped", since=time.time(), detail="", error=None, hint="")
        try:
            self.write_record(stopped)
        except ConfigError as error:
            try:
                (self.directory / "state.json").unlink(missing_ok=True)
            except OSError:
                raise error from None

    def record_stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever somebody else touches the record; None where there is none."""
        with contextlib.suppress(OSError):
            found = (self.directory / "state.json").stat()
            return found.st_ino, found.st_mtime_ns, found.st_size
        return None

    def forbid(self, record: ServiceRecord) -> None:
        """Nobody may take this supervisor's place: it is about to be killed for good."""
        write_atomically(self.directory / "forbidden", f"{record.pid} {record.pid_created}".encode())

    def is_forbidden(self, record: ServiceRecord) -> bool:
        """True for a supervisor that was killed to end its service."""
        with contextlib.suppress(OSError):
            return (self.directory / "forbidden").read_text() == f"{record.pid} {record.pid_created}"
        return False

    def segments(self) -> Segments:
        """What is known of the current run's shared memory."""
        with contextlib.suppress(OSError, ValueError):
            return from_json(Segments, _read(self.directory / "shm.json"))
        return Segments()

    def write_segments(self, segments: Segments) -> None:
        """Remember segments, so that they can go when their run is killed."""
        write_atomically(self.directory / "shm.json", to_json(segments))

    def limits(self) -> Limits:
        """Deadlines of the service, the usual ones where the spec is damaged. Raises NotFoundError."""
        try:
            return self.spec().limits
        except ConfigError:
            return Limits()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the supervisor. Raises MdeployError where there is one already.

        `is_supervised` holds the lock for an instant, so one refusal is not believed.
        """
        self.create()
        with self._lock_file() as file:
            for patience in range(_LOCK_TRIES, -1, -1):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if not patience:
                        raise already_running(self.name) from error
                    time.sleep(_LOCK_PAUSE_S)
            yield

    def _lock_file(self) -> IO[bytes]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.fdopen(os.open(self.directory / "lock", flags, 0o600), "r+b")
        except OSError as error:
            hint = f"it belongs to another user: ls -l {self.directory}"
            raise ConfigError(f"cannot open {self.directory / 'lock'}: {error.strerror}", hint=hint) from error

    @property
    def _own_words(self) -> Path:
        """Where a detached supervisor's stderr goes."""
        return self.directory / "supervisor.log"

    def open_own_words(self) -> IO[bytes]:
        """Append to what detached supervisors say of themselves; anything but a file of ours is replaced."""
        path, flags = self._own_words, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
                path.unlink()
        try:
            return os.fdopen(os.open(path, flags | os.O_CLOEXEC, 0o600), "ab")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}", hint=f"ls -ld {self.directory}") from error

    def forget_own_words(self) -> None:
        """Begin anew, as the one that holds the lock."""
        with self.open_own_words() as file:
            os.ftruncate(file.fileno(), 0)

    def own_words(self) -> str:
        """The last line a detached supervisor wrote, hints excepted: where it died of itself, that says of what."""
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in _read(self._own_words).decode(errors="replace").split("\n")]
            return next((line for line in reversed(lines) if line and not line.startswith("hint:")), "")
        return ""

    def is_supervised(self) -> bool:
        """True while a supervisor lives."""
        try:
            with (self.directory / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, IsADirectoryError):
            return False
        except PermissionError:  # somebody else's service: its process can be seen all the same
            record = self.record()
            return record is not None and lives(record)
        except BlockingIOError:
            return True
        return False


def lives(record: ServiceRecord) -> bool:
    """True while the supervisor that wrote a record lives; its pid means nothing after another boot."""
    return record.boot_id == processes.boot_id() and processes.is_same(record.pid, record.pid_created)


def _read(path: Path) -> bytes:
    """A regular file, and nothing that could hang us or lead elsewhere. Raises OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def already_running(name: str) -> AlreadyRunningError:
    """The error for a name that is taken."""
    return AlreadyRunningError(
        f"service {name!r} is already running",
        hint=f"mdeploy stop {name}, or give the new one another name: --name NAME",
    )


def names(paths: Paths) -> tuple[str, ...]:
    """All services with a spec. Raises ConfigError where they may not be seen: none is not the same."""
    if paths.services.is_dir() and not os.access(paths.services, os.R_OK | os.X_OK):
        hint = "act as the user it belongs to (root: sudo), or set MDEPLOY_HOME to a home of your own"
        raise ConfigError(f"cannot read {paths.services}: it belongs to another user", hint=hint)
    found = sorted(paths.services.glob("*/spec.json")) if paths.services.is_dir() else []
    return tuple(path.parent.name for path in found if _NAME.fullmatch(path.parent.name))


def listing(paths: Paths) -> tuple[ServiceStatus, ...]:
    """The truth about every service, by name."""
    return tuple(_status_or_damage(ServiceFiles(paths, name)) for name in names(paths))


def _status_or_damage(files: ServiceFiles) -> ServiceStatus:
    """One damaged spec must not hide the services beside it."""
    try:
        return status(files)
    except ConfigError as error:
        nothing = ServiceSpec(files.name, "unknown", (), {}, "/", "127.0.0.1", 0, Probe("", "", {}), "unknown")
        return ServiceStatus(nothing, "failed", None, _modified(files), error=error.message, hint=error.hint)


def status(files: ServiceFiles) -> ServiceStatus:
    """What is true now: the record, checked against the lock, the boot and the processes."""
    spec, record = files.spec(), files.record()
    if record is None:
        phase: Phase = "starting" if files.is_supervised() else "stopped"
        return ServiceStatus(spec, phase, None, _modified(files))
    now = ServiceStatus(
        spec,
        record.phase,
        record.pid if record.phase in _ACTIVE else None,
        record.since,
        record.restarts,
        record.detail,
        record.error,
        record.hint,
        record.exit_code,
        record.manager,
    )
    if files.is_supervised():
        return now
    return _unsupervised(files, now, record) if record.phase in _ACTIVE else now


def _unsupervised(files: ServiceFiles, now: ServiceStatus, record: ServiceRecord) -> ServiceStatus:
    """Nobody keeps the record true any more, so its active phase is a lie."""
    if record.boot_id != processes.boot_id():
        why = "the machine was restarted"
    else:
        leftovers, last_words = processes.marked(record.run_id), files.own_words()
        why = "its supervisor was killed" + (f" ({last_words})" if last_words else "")
        why += f"; {len(leftovers)} of its processes are still there" if leftovers else ""
    hint = f"mdeploy restart {record.name}, or mdeploy stop {record.name}"
    return dataclasses.replace(now, phase="failed", pid=None, error=why, hint=hint)


def _modified(files: ServiceFiles) -> float:
    with contextlib.suppress(OSError):
        return (files.directory / "spec.json").stat().st_mtime
    return time.time()
