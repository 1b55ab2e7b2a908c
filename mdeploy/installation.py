"""`install-systemd` and `uninstall-systemd`: checks everything, shows or takes the steps, waits for a real answer.

Nothing is changed before every service has passed every check; a service that does not become
ready is taken back, with what it replaced put into place again, and the cause shown.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdeploy import dispatch, reservations, services, snapshot
from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UnavailableError, UsageError
from mdeploy.settings import Settings
from mdeploy.specs import Say, ServiceSpec, ServiceStatus
from mdeploy.supervise import control, state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.state import ServiceFiles
from mdeploy.systemd import host, install, manager, preflight, units
from mdeploy.systemd.host import Host
from mdeploy.systemd.install import Layout
from mdeploy.systemd.manager import Unit
from mdeploy.systemd.preflight import Finding
from mdeploy.systemd.systemctl import Systemctl
from mdeploy.systemd.transaction import Step, Transaction, Undo, undisturbed
from mdeploy.systemd.units import Scope, UnitFile

Change = Literal["installed", "updated", "started", "unchanged"]
OnProgress = Callable[[ServiceStatus], None]

FILE = "mdeploy.yaml"
_SYSTEM_NAMES = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "usr", "var")
_SYSTEM_TREES = ("/", *(f"/{name}" for name in _SYSTEM_NAMES))


@dataclass(frozen=True, slots=True)
class Request:
    """What `install-systemd` was asked; `user` is who services run as, None for the default."""

    names: tuple[str, ...] = ()
    scope: Scope = "system"
    user: str | None = None
    file: Path | None = None
    start: bool = True


@dataclass(frozen=True, slots=True)
class Preview:
    """What would be written and run, in order."""

    files: tuple[UnitFile, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one service."""

    unit: str
    change: Change
    status: ServiceStatus


# install


def preview(settings: Settings, request: Request, say: Say) -> Preview:
    """The files and commands of an installation; works for anybody, also where there is no systemd."""
    _check_request(request)
    machine = host.look()
    files: dict[str, UnitFile] = {}
    commands: dict[str, None] = {}
    for spec in _specs(settings, request, say):
        plan = _layout(settings, request, spec, machine)
        files.update({file.path: file for file in plan.files})
        steps = (
            *_stop_detached(settings, plan),
            *install.steps(plan, say),
            *([_start(plan, is_new=True)] if request.start else []),
        )
        commands.update(dict.fromkeys(step.shell for step in steps if step.file is None))
    return Preview(tuple(files.values()), tuple(commands))


def install_services(settings: Settings, request: Request, say: Say, on_progress: OnProgress) -> tuple[Outcome, ...]:
    """Install services as units, start them and wait for each to answer, in the order they depend on each other.

    Raises ConfigError with every finding before anything is changed. Where a service does not become
    ready, it alone is taken back, those after it are not begun, and its cause is raised.
    """
    _check_request(request)
    machine = host.look()
    _check_allowed(request.scope, machine)
    with _alone(request.scope):
        return _install_all(settings, request, machine, say, on_progress)


@contextlib.contextmanager
def _alone(scope: Scope) -> Iterator[None]:
    """One at a time: what one takes back, another may just have built on. Raises MdeployError for the second."""
    directory = Path("/run") if scope == "system" else Path(Systemctl(scope).environment()["XDG_RUNTIME_DIR"])
    with (directory / "mdeploy-install.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MdeployError("another install-systemd or uninstall-systemd is at work", hint="wait for it") from error
        yield


def _install_all(
    settings: Settings, request: Request, machine: Host, say: Say, on_progress: OnProgress
) -> tuple[Outcome, ...]:
    specs = _specs(settings, request, lambda text: None)
    plans = [_layout(settings, request, spec, machine) for spec in specs]
    keys = _file(request) is None  # of a file they are written with the spec
    _raise_all([(plan, finding) for plan in plans for finding in _findings(settings, plan, keys=keys)])
    done: list[Outcome] = []
    try:
        for plan in plans:
            done.append(_install(settings, request, plan, say, on_progress))
    finally:
        if len(done) < len(plans) > 1:
            say(_how_far([outcome.status.spec.name for outcome in done], plans[len(done) + 1 :]))
    return tuple(done)


def _how_far(done: Sequence[str], rest: Sequence[Layout]) -> str:
    """What an installation of several services that broke off leaves."""
    later = [plan.resident.spec.name for plan in rest]
    return f"installed before it: {', '.join(done) or 'none'}; not begun: {', '.join(later) or 'none'}"


def _check_request(request: Request) -> None:
    if request.user and request.scope == "user":
        raise UsageError("--as goes with the machine's units", hint="a user unit runs as its user")
    if request.user == "root":
        raise UsageError("a service does not run as root", hint="leave out --as: the user mdeploy is made for it")
    if request.user and not preflight.exists(request.user):
        raise ConfigError(f"there is no user {request.user}", hint=f"useradd --system {shlex.quote(request.user)}")


def _check_allowed(scope: Scope, machine: Host) -> None:
    if not machine.booted:
        hint = "mdeploy serve llm -d starts one in the background, mdeploy restart NAME one that was served before"
        raise UnavailableError("this machine does not run systemd", hint=hint)
    if machine.version < units.OLDEST:
        hint = f"update to systemd {units.OLDEST}, or mdeploy serve llm -d"
        raise UnavailableError(f"systemd {machine.version} is too old", hint=hint)
    if scope == "system" and os.geteuid() != 0:
        hint = "sudo mdeploy install-systemd …, or for your own account: mdeploy install-systemd --user"
        raise MdeployError("only root may change the machine's units", hint=hint)
    Systemctl(scope).run("show-environment")  # a user's own systemd may not run: better known before than halfway


def _file(request: Request) -> Path | None:
    return request.file or (Path(FILE) if not request.names and Path(FILE).is_file() else None)


def _specs(settings: Settings, request: Request, say: Say) -> tuple[ServiceSpec, ...]:
    """The services meant: named, of the file as they would be, or all that are known; dependencies come first."""
    file = _file(request)
    if file is not None:
        from mdeploy.fleet import prepare_specs

        return prepare_specs(settings, file, request.names, say, dry_run=True)
    names = request.names or state.names(settings.paths)
    if not names:
        hint = f"serve one first: mdeploy serve llm -d, or write {FILE}"
        raise NotFoundError(f"no service is known in {settings.paths.home}", hint=hint)
    return tuple(_with_dependencies(settings, names).values())


def _with_dependencies(settings: Settings, names: Sequence[str]) -> dict[str, ServiceSpec]:
    """Specs by name, each after those it depends on: a unit would start them at boot, so they are units too."""
    found: dict[str, ServiceSpec] = {}
    visited: set[str] = set()

    def visit(name: str) -> None:
        if name not in visited:
            visited.add(name)
            spec = ServiceFiles(settings.paths, name).spec()
            for other in spec.depends_on:
                visit(other)
            found[name] = spec

    for name in names:
        visit(name)
    return found


def _layout(settings: Settings, request: Request, spec: ServiceSpec, machine: Host) -> Layout:
    home = settings.paths.home
    if str(home) in _SYSTEM_TREES:
        raise ConfigError(f"MDEPLOY_HOME={home} belongs to the system", hint="set it to a directory of its own")
    return install.layout(spec, home, request.scope, request.user, machine)


# findings


def _findings(settings: Settings, plan: Layout, *, keys: bool = True) -> list[Finding]:
    spec, found = plan.resident.spec, []
    other = manager.of_others(settings.paths.home, spec.name)
    if other and plan.target.scope == "system":
        fix = f"MDEPLOY_HOME={other.home} mdeploy uninstall-systemd {spec.name}, or serve it under another name"
        found.append(Finding(f"the unit {other.name} belongs to another home, {other.home}", fix))
    if not _is_active(settings, spec.name):
        try:
            check_port(spec.host, spec.port)
        except ConfigError as error:
            found.append(Finding(error.message, error.hint))
    return [*found, *(install.check(plan, keys=keys) if plan.target.scope == "system" else [])]


def _is_active(settings: Settings, name: str) -> bool:
    return ServiceFiles(settings.paths, name).is_supervised()


def _raise_all(findings: Sequence[tuple[Layout, Finding]], what: str = "nothing was changed") -> None:
    if not findings:
        return
    lines = [f"{plan.resident.spec.name}: {finding.problem}\n    fix: {finding.fix}" for plan, finding in findings]
    raise ConfigError(f"{what}, because\n  " + "\n  ".join(lines), hint="mend these and run it again")


# one service


def _install(settings: Settings, request: Request, plan: Layout, say: Say, on_progress: OnProgress) -> Outcome:
    unit, files = plan.unit, ServiceFiles(settings.paths, plan.resident.spec.name)
    installed, was_active = manager.find(settings.paths.home, files.name), manager.is_active(unit)

    def as_before() -> None:
        """The end of a rollback: the files are those of before, so systemd is to do what they say."""
        unit.systemctl.run("daemon-reload")
        if was_active:
            manager.start(unit)

    with Transaction(say, as_before) as transaction:
        is_new_spec = transaction.take(_prepare(settings, request, files.name, say, as_before))
        plan = _looked_at_again(settings, request, plan)
        for step in _stop_detached(settings, plan):
            say(f"{files.name} runs in the background: stopping it, systemd takes it over")
            transaction.take(step)
        if was_active and installed and installed.user != unit.user:
            transaction.take(_stop_before_reload(unit))
        changed = any([is_new_spec, *[transaction.take(step) for step in install.steps(plan, say)]])
        started = changed if was_active else request.start  # what runs must not go on with files of another
        if started:
            with reservations.starting(settings.paths, plan.resident.spec):
                before = files.record_stamp()
                transaction.take(_start(plan, is_new=installed is None))
                _wait(files, unit, on_progress, before)
    change: Change = "started" if started else "unchanged"
    if changed:
        change = "updated" if installed else "installed"
    return Outcome(unit.name, change, state.status(files))


def _prepare(settings: Settings, request: Request, name: str, say: Say, as_before: Undo) -> Step:
    """Write what a file says of one service, which ends one that runs with something else; undone, it is as it was."""
    file = _file(request)

    def take() -> Undo | None:
        if file is None:
            return None
        from mdeploy.fleet import prepare_specs

        before = snapshot.take(settings.paths, name)
        try:
            prepare_specs(settings, file, [name], say)
        except BaseException:
            with undisturbed():
                before.restore()
                as_before()
            raise
        return before.restore if before.is_changed() else None

    return Step(f"mdeploy up --file {file} {name}", take)


def _looked_at_again(settings: Settings, request: Request, planned: Layout) -> Layout:
    """A file's service as it was written: its key is new, its model may have been downloaded only now."""
    if _file(request) is None:
        return planned
    spec = ServiceFiles(settings.paths, planned.resident.spec.name).spec()
    plan = _layout(settings, request, spec, planned.host)
    findings = [(plan, finding) for finding in _findings(settings, plan)]
    _raise_all(findings, f"{spec.name} was not installed")
    return plan


def _stop_before_reload(unit: Unit) -> Step:
    """End what runs as another user: reloaded, systemd would clear all of that user's shared memory at its end."""

    def take() -> Undo:
        manager.stop(unit)
        return lambda: None  # the end of a rollback starts it

    return Step(shlex.join([*unit.systemctl.command, "stop", unit.name]), take)


def _stop_detached(settings: Settings, plan: Layout) -> tuple[Step, ...]:
    """The step that ends a service which runs beside systemd; undone, it runs as it did."""
    files = ServiceFiles(settings.paths, plan.resident.spec.name)
    if not files.is_supervised() or manager.find(settings.paths.home, files.name) is not None:
        return ()

    def take() -> Undo:
        control.stop(files)
        return lambda: dispatch.begin(files)

    return (Step(f"mdeploy stop {files.name}", take),)


def _start(plan: Layout, *, is_new: bool) -> Step:
    """Start it, or start it anew where it runs with what was written before."""
    unit = plan.unit

    def undo() -> None:
        manager.stop(unit)
        if is_new and unit.scope == "system":
            install.forget_cache(unit)

    def take() -> Undo:
        was_active = manager.is_active(unit)
        if was_active:
            manager.stop(unit)
        manager.start(unit)
        return undo

    return Step(shlex.join([*unit.systemctl.command, "start", unit.name]), take)


def _wait(files: ServiceFiles, unit: Unit, on_progress: OnProgress, before: tuple[int, int, int] | None) -> None:
    status = dispatch.wait(files, unit, on_progress, before)
    if status.phase != "ready":
        error = services.failure(status)
        if "mdeploy logs" in error.hint:  # it will be no unit any more, and its log is in the journal
            error.hint = error.hint.replace(f"mdeploy logs {files.name}", unit.journal)
        raise error


# uninstall


def uninstall(settings: Settings, names: Sequence[str], scope: Scope, say: Say) -> tuple[str, ...]:
    """Stop units of this home and remove what was installed for them; returns the names of the services.

    No names mean every unit of this home. Raises NotFoundError for one that is not installed.
    """
    _check_allowed(scope, host.look())
    with _alone(scope):
        chosen = _chosen(settings, names, scope)
        if not chosen:
            say(f"no {scope} units of {settings.paths.home}")
        for unit in chosen:
            dispatch.stop(ServiceFiles(settings.paths, unit.service))
            for step in _removal(unit, ()):
                step.take()
            say(f"{unit.service} is no unit any more; to start it in the background: mdeploy restart {unit.service}")
    return tuple(unit.service for unit in chosen)


def preview_removal(settings: Settings, names: Sequence[str], scope: Scope) -> Preview:
    """The commands of an uninstallation, in order."""
    chosen = _chosen(settings, names, scope)
    gone: list[Unit] = []
    commands: list[str] = []
    for unit in chosen:
        commands += [step.shell for step in _removal(unit, gone)]
        gone.append(unit)
    return Preview((), tuple(dict.fromkeys(commands)))


def _removal(unit: Unit, gone: Sequence[Unit]) -> tuple[Step, ...]:
    others = [other for other in manager.installed(unit.scope) if other != unit and other not in gone]
    return install.removal(unit, last=not others)


def _chosen(settings: Settings, names: Sequence[str], scope: Scope) -> tuple[Unit, ...]:
    home = settings.paths.home
    if not names:
        every = (unit for unit in manager.installed(scope) if manager.find(home, unit.service) == unit)
        return tuple(every)
    found = []
    for name in dict.fromkeys(names):
        unit = manager.find(home, state.check_name(name))
        if unit is None or unit.scope != scope:
            raise _not_installed(settings, name, scope, unit)
        found.append(unit)
    return tuple(found)


def _not_installed(settings: Settings, name: str, scope: Scope, unit: Unit | None) -> NotFoundError:
    if unit is not None:
        flag = " --user" if unit.scope == "user" else ""
        return NotFoundError(f"{name} is a {unit.scope} unit", hint=f"mdeploy uninstall-systemd {name}{flag}")
    other = manager.of_others(settings.paths.home, name)
    if other:
        hint = f"MDEPLOY_HOME={shlex.quote(str(other.home))} mdeploy uninstall-systemd {name}"
        return NotFoundError(f"{name} is a unit of another home", hint=hint)
    return NotFoundError(f"{name} is not installed as a {scope} unit", hint="mdeploy ps shows who runs what")
