"""Services that run as units: which ones there are, and start, stop and log through systemd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdeploy.systemd.systemctl import Systemctl
from mdeploy.systemd.units import DROPIN, SYSTEM_UNITS, Installed, Scope, read_dropin, unit_name


@dataclass(frozen=True, slots=True)
class Unit:
    """A service of some home that is installed as a unit, and the user it runs as.

    `credentials` are the names of the files systemd hands over to it; a user unit reads its own.
    """

    scope: Scope
    service: str
    home: Path
    user: str
    credentials: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What systemd calls it."""
        return unit_name(self.service)

    @property
    def journal(self) -> str:
        """How a person reads what systemd keeps of it."""
        return f"journalctl {'--user ' if self.scope == 'user' else ''}-u {self.name}"

    @property
    def systemctl(self) -> Systemctl:
        """The systemd that runs it."""
        return Systemctl(self.scope)


def directory(scope: Scope) -> Path:
    """Where units of ours are written: of the machine, or of whoever asks."""
    if scope == "system":
        return SYSTEM_UNITS
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config) / "systemd" / "user"


def find(home: Path, name: str) -> Unit | None:
    """The unit that runs a service of this home, if there is one."""
    return next((unit for unit in _named(name) if _same(unit.home, home)), None)


def of_others(home: Path, name: str) -> Unit | None:
    """A system unit of the same name that belongs to another home: a machine has each name once."""
    return next((unit for unit in _named(name) if unit.scope == "system" and not _same(unit.home, home)), None)


def _same(one: Path, other: Path) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _named(name: str) -> Iterator[Unit]:
    scopes: tuple[Scope, ...] = ("system", "user")
    for scope in scopes:
        found = read_dropin(directory(scope) / f"{unit_name(name)}.d" / DROPIN)
        if found:
            yield _unit(scope, found)


def installed(scope: Scope) -> tuple[Unit, ...]:
    """Every unit of ours in a scope, by name."""
    found = (read_dropin(path) for path in sorted(directory(scope).glob(f"mdeploy@*.service.d/{DROPIN}")))
    return tuple(_unit(scope, entry) for entry in found if entry)


def _unit(scope: Scope, found: Installed) -> Unit:
    return Unit(scope, found.service, Path(found.home), found.user, found.credentials)


def start(unit: Unit) -> None:
    """Have systemd start it, whatever it gave up before; does not wait. Raises MdeployError."""
    unit.systemctl.asks("reset-failed", unit.name)
    unit.systemctl.run("start", "--no-block", unit.name)


def stop(unit: Unit) -> bool:
    """Have systemd stop it and wait for that; True where anything was running. Raises MdeployError."""
    was = unit.systemctl.show(unit.name)
    unit.systemctl.run("stop", unit.name)
    unit.systemctl.asks("reset-failed", unit.name)
    return not was.is_over


def is_active(unit: Unit) -> bool:
    """True while it runs, or is on its way up or down."""
    return unit.systemctl.asks("is-active", unit.name) in ("active", "activating", "reloading", "deactivating")


def journal_command(
    unit: Unit, since: float | None, lines: int | None, *, follow: bool = False, output: str = "cat"
) -> list[str]:
    """How to read a unit's log: since a Unix time, the last `lines` of it, and what follows."""
    selector = f"--user-unit={unit.name}" if unit.scope == "user" else f"--unit={unit.name}"
    command = ["journalctl", "--quiet", "--no-pager", f"--output={output}", selector]
    command += [f"--since=@{since:.6f}"] if since is not None else []
    command += [f"--lines={lines}"] if lines is not None else ["--no-tail"] if follow else []
    return [*command, "--follow"] if follow else command


def last_complaint(unit: Unit) -> str:
    """What systemd last said of a unit that did not get as far as running ours; empty where it may not be read."""
    import subprocess

    command = journal_command(unit, None, 20)
    said = subprocess.run(command, env=unit.systemctl.environment(), capture_output=True, text=True, check=False)
    latest = said.stdout.rpartition(f"Starting {unit.name}")[2].splitlines()
    return next((line for line in latest if "Failed" in line), "")
