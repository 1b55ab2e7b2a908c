"""One service, whoever runs it: what starts and stops it where it is a unit, and where it is not.

A user types `mdeploy stop chat` and need not know. Everything above goes through here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UnavailableError
from mdeploy.paths import Paths
from mdeploy.specs import ServiceSpec, ServiceStatus
from mdeploy.supervise import control, state
from mdeploy.supervise.state import ServiceFiles
from mdeploy.systemd import manager
from mdeploy.systemd.manager import Unit
from mdeploy.systemd.systemctl import Shown

if TYPE_CHECKING:
    from mdeploy.systemd.install import Layout

_POLL_S = 0.2
_OVER = ("ready", "failed", "stopped")

# How systemd itself failed, before there was a supervisor to say why: systemd.exec(5), "Process exit codes".
_EXITS = {
    203: "systemd cannot execute mdeploy",
    217: "its user does not exist",
    218: "systemd cannot give it its limits or capabilities",
    226: "a path its sandbox needs is missing",
    243: "systemd cannot hand over its key file",
}

_RESULTS = {
    "oom-kill": "the kernel killed one of its processes for want of memory (oom-kill)",
    "success": "something else than mdeploy or systemd ended it",
}

OnProgress = Callable[[ServiceStatus], None]


def start(files: ServiceFiles, on_progress: OnProgress) -> ServiceStatus:
    """Start a service in the background and wait until it has answered or failed. Raises MdeployError."""
    unit = manager.find(files.home, files.name)
    if unit is None:
        return control.start_detached(files, on_progress)
    _check_idle(files, unit)
    if unit.scope == "user" or os.geteuid() == 0:  # else systemd will say who may start it
        _refresh(unit, _layout(unit, files.spec()))
    before = files.record_stamp()
    manager.start(unit)
    return wait(files, unit, on_progress, before)


def _check_idle(files: ServiceFiles, unit: Unit) -> None:
    if files.is_supervised() or not unit.systemctl.show(unit.name).is_over:
        raise state.already_running(files.name)


def begin(files: ServiceFiles) -> None:
    """Start a service and leave it to itself: for a command that was interrupted and must not wait."""
    unit = manager.find(files.home, files.name)
    if unit is not None:
        manager.start(unit)
    else:
        control.spawn_detached(files)


def write_spec(files: ServiceFiles, spec: ServiceSpec) -> None:
    """Replace a spec and, where the service is a unit, what systemd was told of it.

    A boot starts units without asking us: one that was not told of the first key would not start.
    Raises ConfigError, with nothing changed, for what no unit can do.
    """
    unit = manager.find(files.home, files.name)
    if unit is None:
        files.write_spec(spec)
        return
    if unit.scope == "system" and os.geteuid() != 0:
        raise MdeployError(f"{files.name} is a unit of this machine, which only root may change", hint="sudo mdeploy …")
    plan = _layout(unit, spec)
    files.write_spec(spec)
    _refresh(unit, plan)


def _layout(unit: Unit, spec: ServiceSpec) -> Layout:
    from mdeploy.systemd import host, install

    return install.layout(spec, unit.home, unit.scope, unit.user, host.look())


def _refresh(unit: Unit, plan: Layout) -> None:
    """Bring what is installed to what the spec says; a systemd that does not run will read it when it does."""
    from mdeploy.systemd import install

    if install.refresh(plan) and plan.host.booted:
        with contextlib.suppress(UnavailableError):
            unit.systemctl.run("daemon-reload")


def wait(
    files: ServiceFiles, unit: Unit, on_progress: OnProgress, before: tuple[int, int, int] | None
) -> ServiceStatus:
    """Wait for the start of a unit to end one way or the other; an interrupt leaves it to systemd.

    `before` is the record's stamp from before the start: what it said then is about another run.
    Raises MdeployError where systemd never got as far as our supervisor.
    """
    while True:
        shown = unit.systemctl.show(unit.name)
        record = files.record()
        if record and shown.main_pid == record.pid and files.record_stamp() != before:
            now = state.status(files)
            on_progress(now)
            if now.phase in _OVER:
                return now
        elif shown.is_over or shown.sub == "auto-restart":
            raise _never_ran(unit, shown)
        time.sleep(_POLL_S)


def _never_ran(unit: Unit, shown: Shown) -> MdeployError:
    what = _EXITS.get(shown.exit_status, f"it ended with {shown.result or 'success'} (status {shown.exit_status})")
    kind = ConfigError if shown.exit_status in _EXITS else MdeployError
    said = manager.last_complaint(unit)
    return kind(f"{unit.service}: {what}{': ' + said if said else ''}", hint=unit.journal)


def stop(files: ServiceFiles) -> bool:
    """End a service and everything of it; True where something was running. Raises MdeployError."""
    unit = manager.find(files.home, files.name)
    if unit is None:
        return control.stop(files)
    was_running = manager.stop(unit)
    if files.is_supervised():  # somebody started it by hand, beside its unit
        return control.stop(files)
    _settle(files)
    return was_running


def _settle(files: ServiceFiles) -> None:
    """A supervisor that was killed left a record that says `ready`: it is to say `stopped`, as after any stop."""
    record = files.record()
    if record is None or record.phase == "stopped" or not os.access(files.directory, os.W_OK):
        return
    files.settle(record)


def listing(paths: Paths) -> tuple[ServiceStatus, ...]:
    """The truth about every service of this home, by name."""
    return tuple(_with_systemd(paths, status) for status in state.listing(paths))


def _with_systemd(paths: Paths, status: ServiceStatus) -> ServiceStatus:
    """A service that ended and that systemd is about to start again is starting.

    It may well say `stopped`: systemd asks a service to end whose processes took too much memory.
    """
    if status.manager != "systemd" or status.phase not in ("failed", "stopped"):
        return status
    unit = manager.find(paths.home, status.spec.name)
    if unit is None:
        return status
    shown = unit.systemctl.show(unit.name)
    if shown.sub != "auto-restart":
        return status
    why = status.error or _RESULTS.get(shown.result, f"it ended with {shown.result}")
    detail = f"systemd starts it again; before: {why}"
    return dataclasses.replace(status, phase="starting", detail=detail, error=None, hint="")


def listing_of_others(paths: Paths) -> tuple[ServiceStatus, ...]:
    """The machine's units that belong to other homes, as far as the caller may look into these."""
    found = []
    for unit in manager.installed("system"):
        if unit.home != paths.home:
            try:
                other = Paths(unit.home)
                found.append(_with_systemd(other, state.status(ServiceFiles(other, unit.service))))
            except (OSError, NotFoundError, ConfigError):  # a private home: its services are nobody else's business
                continue
    return tuple(found)
