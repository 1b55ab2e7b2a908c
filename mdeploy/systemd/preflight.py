"""Whether a service can run as its user, found out before anything is changed or started.

The questions are asked by a child process that has become that user: the kernel knows about
modes, groups and ACLs. For a path that the unit will bind into the sandbox the child starts at
an open directory, because that is what a bind mount gives: the parents of it do not matter there.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdeploy.errors import MdeployError
from mdeploy.systemd.host import Host
from mdeploy.systemd.needs import Needs
from mdeploy.systemd.units import MODELS, Resident, is_below

_NOBODY = 65534
_SHOWN = 3
"""Files named in one finding; a model may have hundreds."""

_UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that would keep a service from running: what is wrong, and what mends it."""

    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Account:
    """Who a service runs as. `uid` of a user that does not exist yet is nobody's: it has the same rights."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def exists(user: str) -> bool:
    """True for a user this machine knows."""
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


def account(name: str, device_groups: Sequence[str]) -> Account:
    """A user's ids and groups. Raises KeyError for a group that does not exist."""
    more = tuple(grp.getgrnam(group).gr_gid for group in device_groups)
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return Account(name, _NOBODY, _NOBODY, more)
    return Account(name, entry.pw_uid, entry.pw_gid, (*os.getgrouplist(name, entry.pw_gid), *more))


def check(resident: Resident, needs: Needs, program: str, host: Host, *, keys: bool = True) -> tuple[Finding, ...]:
    """Everything that is wrong with a service, all at once; to be called as root.

    Without `keys` they are not looked at: they are written later.
    """
    who = account(resident.user, resident.groups)
    denied = _denied(tuple(_wanted(needs, program)), resident.binds, who)
    return (
        *(_keys(resident) if keys else ()),
        *_port(resident),
        *_nodes(resident, host, who),
        *_findings(denied, who, needs.data),
    )


# keys, port, devices


def _keys(resident: Resident) -> Iterator[Finding]:
    for file in sorted(set(resident.spec.secrets.values())):
        path, again = Path(file), f"mdeploy keys add {resident.spec.name}, or serve again with the key"
        if not path.is_file():
            yield Finding(f"the key file {file} does not exist", again)
        elif not path.read_bytes().strip():
            yield Finding(f"the key file {file} is empty", again)


def _port(resident: Resident) -> Iterator[Finding]:
    port, first = resident.spec.port, 1024
    if _UNPRIVILEGED_PORTS.is_file():
        first = int(_UNPRIVILEGED_PORTS.read_text())
    if port < first:
        fix = f"serve on a port from {first} on, behind a proxy if need be"
        yield Finding(f"only root may listen on port {port}, and services do not run as root", fix)


def _nodes(resident: Resident, host: Host, who: Account) -> Iterator[Finding]:
    """GPU device nodes; those that are missing are made at boot where nvidia-modprobe is installed."""
    if not resident.on_gpus:
        return
    nodes = ["/dev/nvidiactl", "/dev/nvidia-uvm", *(f"/dev/nvidia{minor}" for minor in host.gpu_minors)]
    missing = [node for node in nodes if not Path(node).exists()]
    if missing and host.nvidia_modprobe is None:
        yield Finding(
            f"{', '.join(missing)} do not exist", "install nvidia-modprobe, or run nvidia-smi as root at boot"
        )
    present = [node for node in nodes if node not in missing]
    closed = _as_user(who, lambda: [node for node in present if not os.access(node, os.R_OK | os.W_OK)])
    for node in closed:
        yield Finding(f"{who.name} may not open {node}", f"chmod a+rw {node}, or give it a group by a udev rule")


# files


@dataclass(frozen=True, slots=True)
class _Access:
    """A path and how it will be used, as a mode of access(2); `real` is where it is once links are resolved."""

    path: str
    mode: int

    @property
    def real(self) -> str:
        return os.path.realpath(self.path)


def _wanted(needs: Needs, program: str) -> Iterator[_Access]:
    yield from (_Access(path, os.R_OK | os.X_OK) for path in (program, needs.program))
    for path in needs.data:
        yield _Access(path, _mode(path))
        for directory, names, files in os.walk(path):
            yield from (_Access(os.path.join(directory, name), os.R_OK | os.X_OK) for name in names)  # noqa: PTH118
            yield from (_Access(os.path.join(directory, name), os.R_OK) for name in sorted(files))  # noqa: PTH118
    yield from (_Access(path, _mode(path)) for path in needs.named)


def _mode(path: str) -> int:
    return os.R_OK | os.X_OK if Path(path).is_dir() else os.R_OK


def _denied(wanted: Sequence[_Access], binds: Sequence[str], who: Account) -> tuple[str, ...]:
    """The paths that are in the way of what is wanted: a file itself, or the first closed directory before it."""
    doors = {os.path.realpath(path): os.open(path, os.O_PATH) for path in binds if Path(path).exists()}
    asked = [(access.real, access.mode) for access in wanted]
    try:
        found: list[str | None] = _as_user(who, lambda: [_obstacle(real, mode, doors) for real, mode in asked])
    finally:
        for door in doors.values():
            os.close(door)
    return tuple(dict.fromkeys(path for path in found if path))


def _obstacle(real: str, mode: int, doors: Mapping[str, int]) -> str | None:
    door = max((path for path in doors if is_below(real, (path,))), key=len, default="")

    def seen(path: str) -> str:
        return f"/proc/self/fd/{doors[door]}{path[len(door) :]}" if door else path

    if os.access(seen(real), mode):
        return None
    before = [str(path) for path in reversed(Path(real).parents)]
    steps = [path for path in before if not door or is_below(path, (door,))]
    return next((path for path in steps if not os.access(seen(path), os.X_OK)), real)


def _as_user(who: Account, question: Callable[[], Any]) -> Any:
    """Ask as that user, in a child; the answer comes back as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups(who.groups)
            os.setresgid(who.gid, who.gid, who.gid)
            os.setresuid(who.uid, who.uid, who.uid)
            with os.fdopen(writer, "w") as file:
                json.dump(question(), file)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise MdeployError(f"cannot find out what {who.name} may read", hint="install-systemd must run as root")
    return json.loads(answer)


# in words


def _findings(denied: Sequence[str], who: Account, data: Sequence[str]) -> Iterator[Finding]:
    """One finding a directory: a model may have hundreds of files that are closed for the same reason."""
    closed: dict[str, list[str]] = {}
    for path in denied:
        folder = Path(path).is_dir()
        closed.setdefault(path if folder else str(Path(path).parent), []).extend([] if folder else [path])
    for directory, files in closed.items():
        yield _closed_files(directory, files, who) if files else _closed_directory(directory, who, data)


def _closed_files(directory: str, files: Sequence[str], who: Account) -> Finding:
    names = ", ".join(Path(path).name for path in files[:_SHOWN])
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return Finding(
        f"{who.name} may not read {names}{more} in {directory} ({_mode_of(files[0])})", f"chmod -R a+rX {_q(directory)}"
    )


def _closed_directory(directory: str, who: Account, data: Sequence[str]) -> Finding:
    model = next((path for path in data if is_below(os.path.realpath(path), (directory,))), None)
    fix = f"chmod a+rX {_q(directory)}"
    if model and model != directory:
        fix += f", or move the model: cp -rL {_q(model)} {MODELS}/ and serve it from there"
    return Finding(f"{who.name} may not enter {directory} ({_mode_of(directory)})", fix)


def _mode_of(path: str) -> str:
    seen = Path(path).stat()
    try:
        owner = pwd.getpwuid(seen.st_uid).pw_name
    except KeyError:
        owner = str(seen.st_uid)
    return f"{stat.filemode(seen.st_mode)} {owner}"


def _q(path: str) -> str:
    return shlex.quote(path)
