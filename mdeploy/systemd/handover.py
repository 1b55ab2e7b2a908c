"""A service's directory, given to the user it runs as and taken back again.

In between that user may write there what it likes. So nothing it wrote is used by root afterwards
but the text of its log: a record names processes to kill and directories to remove, a link would be
followed, and a module lying beside an engine would be run by it.
"""

from __future__ import annotations

import pwd
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mdeploy.errors import ConfigError
from mdeploy.systemd.manager import Unit
from mdeploy.systemd.transaction import Owner, Step, Undo, own
from mdeploy.systemd.units import Resident

_RECORDS = ("state.json", "shm.json", "forbidden", "supervisor.log")
_LOG = re.compile(r"log(\.\d+)?")


def group_of(user: str) -> str:
    """A user's own group; for one that does not exist yet the group of its name, as sysusers.d makes it."""
    import grp

    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return user


# give


def give(resident: Resident) -> Iterator[Step]:
    """The service may add files to its directory, but not replace its spec or its lock: those are root's (sticky bit).

    Directories above are opened so that everybody can see how a service is. What keys are in is
    closed: until now the home itself may have hidden it.
    """
    home, directory = Path(resident.home), Path(resident.directory)
    group = group_of(resident.user)
    yield own(home / "config.yaml", Owner(mode=0o600))
    yield own(home / "secrets", Owner(mode=0o700))
    yield own(home, Owner(mode=0o755))
    yield own(home / "services", Owner(mode=0o755))
    yield own(directory / "spec.json", Owner("root", "root", 0o644))
    yield own(directory / "lock", Owner("root", group, 0o660), create=True)
    yield _kept_closed(directory / "revisions")
    for path in (*(directory / name for name in _RECORDS), *_logs(directory)):
        if path.is_file():
            yield own(path, Owner(resident.user, group))
    yield _opened(directory, resident.user, group)


def _kept_closed(path: Path) -> Step:
    """Revisions are specs that root applies: their directory is there before the service could make one.

    One that neither root nor the owner of the home has made is refused.
    """

    def take() -> Undo | None:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            _check_ours(path)
            return own(path, Owner("root", "root", 0o700)).take()
        return path.rmdir

    return Step(f"install -d -o root -g root -m 700 {shlex.quote(str(path))}", take)


def _check_ours(path: Path) -> None:
    seen = path.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid not in (0, path.parent.parent.stat().st_uid):
        raise ConfigError(f"{path} was not made by mdeploy, and root would trust it", hint=f"rm -r {path}")


def _opened(directory: Path, user: str, group: str) -> Step:
    """Let the service write to its directory; undone, what it has written there is gone too."""
    step = own(directory, Owner("root", group, 0o1775))

    def take() -> Undo | None:
        close = step.take()
        if close is None:
            return None

        def undo() -> None:
            close()
            _clear(directory, user)

        return undo

    return Step(step.shell, take)


# take back


def take_back(unit: Unit) -> Iterator[Step]:
    """The directory belongs to the owner of the home again, private as before."""
    directory = unit.home / "services" / unit.service
    if not directory.is_dir():
        return
    entry = pwd.getpwuid(directory.parent.stat().st_uid)
    owner = Owner(entry.pw_name, group_of(entry.pw_name), 0o600)
    yield own(directory, Owner(owner.user, owner.group, 0o700))
    yield _cleared(directory, unit.user)
    for name in ("spec.json", "lock"):
        yield own(directory / name, owner)
    yield _given_back(directory, owner)


def _cleared(directory: Path, user: str) -> Step:
    rest = f"find . -mindepth 1 -maxdepth 1 -user {user} ! -name 'log*' -exec rm -r {{}} +"
    words = f"cd {shlex.quote(str(directory))} && rm -rf {' '.join(_RECORDS)} && {rest}"
    return Step(words, lambda: _clear(directory, user))


def _clear(directory: Path, user: str) -> None:
    """Remove what a user has put into a directory, but for logs that are plain files."""
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:  # the account is gone, and its files are nobody's
        uid = None
    for path in directory.iterdir():
        seen = path.lstat()
        is_theirs = seen.st_uid == uid if uid is not None else seen.st_uid != 0
        is_plain = stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1
        is_kept = is_plain if _LOG.fullmatch(path.name) else not (is_theirs or path.name in _RECORDS)
        if not is_kept:
            _remove(path, is_directory=stat.S_ISDIR(seen.st_mode))


def _remove(path: Path, *, is_directory: bool) -> None:
    if is_directory:
        shutil.rmtree(path)
    else:
        path.unlink()


def _given_back(directory: Path, owner: Owner) -> Step:
    """Logs, as plain files, and revisions; looked up when the step is taken, after the rest was cleared."""
    place = shlex.quote(str(directory))

    def take() -> None:
        for path in _logs(directory):
            own(path, owner).take()
        revisions = directory / "revisions"
        for path in revisions.glob("*.json"):
            own(path, Owner(owner.user, owner.group)).take()
        own(revisions, Owner(owner.user, owner.group, 0o700)).take()

    return Step(f"chown -Rh {owner.user}:{owner.group} {place}/log* {place}/revisions", take)


def _logs(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("log*")) if _LOG.fullmatch(path.name)]
