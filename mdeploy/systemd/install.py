"""The steps that make a service a unit, and those that make it none again. Steps are values: nothing is done here."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdeploy.errors import ConfigError
from mdeploy.specs import Say, ServiceSpec
from mdeploy.systemd import gate, handover, needs, preflight, units
from mdeploy.systemd.host import Host
from mdeploy.systemd.manager import Unit
from mdeploy.systemd.manager import directory as unit_directory
from mdeploy.systemd.needs import Needs
from mdeploy.systemd.transaction import Step, Undo, command, enable, remove, remove_empty, run, verb, write
from mdeploy.systemd.units import Program, Resident, Scope, Target, UnitFile

_LINGER = Path("/var/lib/systemd/linger")
CACHE = Path("/var/cache/mdeploy")


@dataclass(frozen=True, slots=True)
class Layout:
    """One service as a unit: all that is needed to install it, verify it or compare it with what is there."""

    target: Target
    host: Host
    program: Program
    resident: Resident
    needs: Needs
    files: tuple[UnitFile, ...]

    @property
    def unit(self) -> Unit:
        """The unit it is or will be."""
        return Unit(self.target.scope, self.resident.spec.name, Path(self.resident.home), self.resident.user)


def forget_cache(unit: Unit) -> None:
    """Remove what JIT compilers of a service have kept; nothing else is in there."""
    unit.systemctl.asks("clean", "--what=cache", unit.name)
    remove_empty(CACHE).take()


def layout(spec: ServiceSpec, home: Path, scope: Scope, user: str | None, host: Host) -> Layout:
    """Look at what a service reads and render its files. Raises ConfigError for what no unit can do."""
    if scope == "system" and spec.secrets and 0 < host.version < units.CREDENTIALS_SINCE:
        raise ConfigError(
            f"systemd {host.version} cannot hand a key over without showing it to others",
            hint=f"update to systemd {units.CREDENTIALS_SINCE}, or run {spec.name} with -d or --user",
        )
    if scope == "system":
        _check_secrets(spec, home)
        _check_tmp(spec)
    target = Target(scope, unit_directory(scope), host.version)
    program, wanted, place = needs.of_program(), needs.of_service(spec), str(home)
    if scope == "system":
        _check_homes(wanted)
    runs_as = (user or units.DEFAULT_USER) if scope == "system" else pwd.getpwuid(os.getuid()).pw_name
    groups = host.device_groups if spec.plan and spec.plan.device == "cuda" else ()
    shown = needs.binds((*program.trees, *wanted.trees), (*units.HIDDEN, place))
    resident = Resident(spec, place, runs_as, shown, wanted.trees, groups)
    return Layout(target, host, program, resident, wanted, tuple(_files(target, host, program, resident)))


def _check_secrets(spec: ServiceSpec, home: Path) -> None:
    """systemd reads these as root: a spec must not have any other file of the machine handed over."""
    for file in spec.secrets.values():
        if os.path.realpath(Path(file).parent) != os.path.realpath(home / "secrets"):
            hint = f"mdeploy keys add {spec.name}, or serve it again with the key"
            raise ConfigError(f"{spec.name} names {file} as a key file, which is not in {home}/secrets", hint=hint)


def _check_tmp(spec: ServiceSpec) -> None:
    """Ray's sockets lie in /tmp, where a machine's part of a cluster and services on it meet: a unit has its own."""
    on_cluster = spec.kind == "app" and any(word.startswith("--cluster=") for word in spec.argv)
    if spec.kind == "cluster" or on_cluster:
        again = "mdeploy cluster start|join" if spec.kind == "cluster" else f"mdeploy restart {spec.name}"
        raise ConfigError(
            f"{spec.name} works in a cluster: a unit, whose /tmp is its own, would not find the sockets of Ray there",
            hint=f"name the services to install, without {spec.name}; in the background: {again}",
        )


def _check_homes(wanted: Needs) -> None:
    """To show a service one file that lies in a home itself, its sandbox would have to show it all that is there."""
    homes = {entry.pw_dir for entry in pwd.getpwall() if units.is_below(entry.pw_dir, units.HIDDEN)}
    for path in wanted.data:
        if path in homes or path in units.HIDDEN:
            raise ConfigError(
                f"the service reads {path} itself, with all that is there",
                hint="move its files to a directory of their own, and serve them from there",
            )


def _files(target: Target, host: Host, program: Program, resident: Resident) -> Iterator[UnitFile]:
    if target.scope == "system":
        yield from [units.sysusers()] if resident.user == units.DEFAULT_USER else []
        yield units.tmpfiles()
        if resident.on_gpus and host.nvidia_modprobe:
            yield units.gpu_unit(target, host.nvidia_modprobe, host.gpu_minors)
    yield units.template(target)
    yield units.dropin(target, program, resident)


def check(plan: Layout, *, keys: bool) -> tuple[preflight.Finding, ...]:
    """What would keep the service from running under systemd; empty where nothing does."""
    return preflight.check(plan.resident, plan.needs, plan.program.python, plan.host, keys=keys)


# install


def steps(plan: Layout, say: Say) -> tuple[Step, ...]:
    """Everything up to an enabled unit, in order; starting it comes after."""
    target, unit = plan.target, plan.unit
    judged = [gate.verify(target, plan.files, unit.name), gate.security(target, plan.files, unit.name)]
    return (
        *(step for step in judged if step),
        *(write(file) for file in plan.files),
        *(_machine(plan) if target.scope == "system" else [linger(plan.resident.user, say)]),
        verb(unit.systemctl, "daemon-reload"),
        enable(unit.systemctl, unit.name),
    )


def _machine(plan: Layout) -> Iterator[Step]:
    """Users, directories and who they belong to; nothing a user unit needs."""
    if plan.resident.user == units.DEFAULT_USER:
        yield command("systemd-sysusers", str(units.SYSUSERS))
    back = () if units.MODELS.exists() else ("rmdir", "--ignore-fail-on-non-empty", str(units.MODELS))
    yield command("systemd-tmpfiles", "--create", str(units.TMPFILES), undo=back)
    yield from handover.give(plan.resident)


def linger(user: str, say: Say) -> Step:
    """Have the user's systemd run from boot on, not from login to logout; where only root may allow that, say so."""
    words = ("loginctl", "--no-ask-password", "enable-linger", user)

    def take() -> Undo | None:
        if (_LINGER / user).exists():
            return None
        try:
            run(words)
        except ConfigError:
            say(f"services of {user} start at login and end at logout until root allows more:")
            say(f"  sudo loginctl enable-linger {user}")
            return None
        say(f"lingering is enabled: services of {user} start at boot")
        return lambda: run(("loginctl", "--no-ask-password", "disable-linger", user))

    return Step(f"loginctl enable-linger {user}", take)


def refresh(plan: Layout) -> bool:
    """Write the service's own files again if they would be others by now; True where systemd must reload."""
    own_files = [file for file in plan.files if Path(file.path).name in (units.DROPIN, units.GPU_UNIT)]
    changed = [file for file in own_files if write(file).take() is not None]
    return bool(changed)


# uninstall


def removal(unit: Unit, *, last: bool) -> tuple[Step, ...]:
    """The way back; with the `last` service go the files that all share. The user stays: ids must not be used twice."""
    own_dropin = unit_directory(unit.scope) / f"{unit.name}.d" / units.DROPIN
    shared = [unit_directory(unit.scope) / units.TEMPLATE]
    shared += (
        [unit_directory("system") / units.GPU_UNIT, units.SYSUSERS, units.TMPFILES] if unit.scope == "system" else []
    )
    return (
        verb(unit.systemctl, "stop", unit.name),
        verb(unit.systemctl, "disable", unit.name),
        *([verb(unit.systemctl, "clean", "--what=cache", unit.name)] if unit.scope == "system" else []),
        remove(own_dropin),
        *(remove(path) for path in shared if last and path.exists()),
        verb(unit.systemctl, "daemon-reload"),
        *(handover.take_back(unit) if unit.scope == "system" else []),
        *([remove_empty(CACHE, units.MODELS)] if unit.scope == "system" and last else []),
    )
