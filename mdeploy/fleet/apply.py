"""Making a file true: start what is new, restart what changed, leave the rest alone; and taking it back.

Services are applied one after the other, each once those it depends on have answered: engines that
load at the same time only wait for the same disk, and one that fails is told apart from the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdeploy import credentials, prepare, reservations, services
from mdeploy.errors import ConfigError, MdeployError, NotReadyError
from mdeploy.fleet import compare, file, plan, revisions
from mdeploy.fleet.compare import Change, Compared
from mdeploy.fleet.file import Fleet
from mdeploy.fleet.plan import Listener, Step
from mdeploy.fleet.revisions import Revision
from mdeploy.paths import Paths
from mdeploy.settings import Settings
from mdeploy.specs import Say, ServiceSpec, ServiceStatus
from mdeploy.supervise import state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.secrets import first_key

Action = Literal["unchanged", "created", "restarted", "started", "failed", "skipped", "rolled back"]

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one service; `error` where it failed, `revision` is what it runs or should run."""

    name: str
    action: Action
    changes: tuple[Change, ...] = ()
    revision: int | None = None
    status: ServiceStatus | None = None
    error: MdeployError | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of `up`; `gone` are services that came from the file, still run, and are no longer in it."""

    outcomes: tuple[Outcome, ...]
    gone: tuple[ServiceStatus, ...]


def up(settings: Settings, path: Path, names: Collection[str], listener: Listener) -> Applied:
    """Apply a file. Where a service fails, those that depend on it are skipped and the others go on.

    Raises whatever is wrong before the first service is touched; then nothing was changed.
    """
    with _alone(settings.paths, listener.say):
        fleet = file.load(settings, path)
        todo = plan.steps(settings, fleet, names, listener, dry_run=False)
        outcomes: dict[str, Outcome] = {}
        for index, step in enumerate(todo):
            outcomes[step.name] = _outcome(settings, fleet, todo[index:], outcomes, listener)
        return Applied(tuple(outcomes.values()), compare.gone(settings.paths, str(fleet.path), fleet.names()))


def preview(settings: Settings, path: Path, names: Collection[str], listener: Listener) -> tuple[Step, ...]:
    """What `up` would do; nothing is written, fetched or started."""
    return plan.steps(settings, file.load(settings, path), names, listener, dry_run=True)


def diff(settings: Settings, path: Path) -> tuple[Compared, ...]:
    """Every service of a file beside what is there, and those that are no longer in it."""
    fleet = file.load(settings, path)
    found = tuple(one for one, _ in plan.compared(settings, fleet, fleet.services))
    gone = compare.gone(settings.paths, str(fleet.path), fleet.names())
    return (*found, *(Compared(status.spec.name, "gone", (), {}, status, None) for status in gone))


def down(settings: Settings, path: Path, names: Collection[str], stopped: Callable[[str, bool], None]) -> None:
    """Stop the services of a file, dependents first; `stopped` hears of each, and whether it ran.

    What fails is raised once all have had their turn.
    """
    fleet = file.load(settings, path)
    failures: list[MdeployError] = []
    for service in fleet.with_dependents(names):
        try:
            known = service.name in state.names(settings.paths)
            stopped(service.name, known and services.stop_service(settings, service.name))
        except MdeployError as error:
            failures.append(error)
    if failures:
        raise type(failures[0])("\n".join(error.message for error in failures), hint=failures[0].hint)


def prepare_specs(
    settings: Settings, path: Path, names: Collection[str], say: Say, *, dry_run: bool = False
) -> tuple[ServiceSpec, ...]:
    """Bring the specs of a file to the disk without starting anything; in the order of starting.

    An unchanged service keeps its spec and goes on running. A changed one that runs is stopped.
    """
    listener = Listener(say, None, lambda status: None)
    if dry_run:
        return tuple(step.spec for step in preview(settings, path, names, listener))
    with _alone(settings.paths, say):
        fleet = file.load(settings, path)
        todo = plan.steps(settings, fleet, names, listener, dry_run=False)
        return tuple(step.spec if step.keeps else _save(settings, fleet, step).spec for step in todo)


# one service


def _outcome(
    settings: Settings, fleet: Fleet, todo: Sequence[Step], earlier: dict[str, Outcome], listener: Listener
) -> Outcome:
    step = todo[0]
    lost = [name for name in step.service.depends_on if earlier[name].error]
    if lost and not (step.keeps and step.running):
        error = NotReadyError(f"{step.name} was not {'re' if step.running else ''}started: it needs {', '.join(lost)}")
        return Outcome(step.name, "skipped", step.compared.changes, error=error)
    try:
        return _keep(settings, step, listener) if step.keeps else _replace(settings, fleet, todo, listener)
    except MdeployError as error:
        failed = _with_way_back(settings.paths, step.spec, error)
        return Outcome(step.name, "failed", step.compared.changes, error=failed)
    finally:
        reservations.release(settings.paths, step.name)


def _keep(settings: Settings, step: Step, listener: Listener) -> Outcome:
    """An unchanged service: left alone where it runs, started where it does not."""
    revision, status = step.compared.revision, _settled(settings, step.name, listener)
    action: Action = "unchanged"
    if status.phase in ("failed", "stopped"):
        listener.say(f"{step.name}: starting, it was {status.phase}")
        status, action = services.launch(settings, step.name, listener.status), "started"
    if revision and status.phase == "ready":
        revisions.mark_ready(settings.paths, revision)
    return Outcome(step.name, action, revision=revision.number if revision else None, status=status)


def _settled(settings: Settings, name: str, listener: Listener) -> ServiceStatus:
    """The status once it neither starts nor stops: somebody else may be at it right now."""
    status = _status(settings, name)
    deadline = time.monotonic() + status.spec.limits.start_timeout_s
    while status.phase in ("starting", "stopping"):
        if time.monotonic() > deadline:
            raise NotReadyError(f"{name} is {status.phase}", hint=f"mdeploy logs {name}")
        listener.status(status)
        time.sleep(_POLL_S)
        status = _status(settings, name)
    return status


def _status(settings: Settings, name: str) -> ServiceStatus:
    """The truth about one service, systemd's view included."""
    found = (status for status in services.list_services(settings) if status.spec.name == name)
    return next(found, None) or state.status(services.files_of(settings, name))


def _replace(settings: Settings, fleet: Fleet, todo: Sequence[Step], listener: Listener) -> Outcome:
    """A new or changed service: written down, started, and remembered as good once it has answered."""
    step = todo[0]
    listener.say(f"{step.name}: {'starting' if step.running is None else 'restarting'}, {_why(step)}")
    _make_way(settings, todo, listener.say)
    revision = _save(settings, fleet, step)
    status = services.launch(settings, step.name, listener.status)
    revisions.mark_ready(settings.paths, revision)
    action: Action = "created" if step.compared.difference == "new" else "restarted"
    return Outcome(step.name, action, step.compared.changes, revision.number, status)


def _why(step: Step) -> str:
    keys = [change.key for change in step.compared.changes]
    return f"changed: {', '.join(keys)}" if keys else "it is new"


def _make_way(settings: Settings, todo: Sequence[Step], say: Say) -> None:
    """Stop what is going to be restarted later anyway, where it still has the port or a GPU of this one."""
    step = todo[0]
    wanted = set(reservations.gpus_of(step.spec))
    for other in todo[1:]:
        old = None if other.keeps else other.running
        if old and (old.port == step.spec.port or wanted & set(reservations.gpus_of(old))):
            say(f"{other.name}: stopped first, {step.name} takes its place")
            services.stop_service(settings, other.name)


def _save(settings: Settings, fleet: Fleet, step: Step) -> Revision:
    """Stop the service if it runs and write its spec, key and revision down."""
    _stop_and_remember(settings, step.compared.status)
    spec = _on_a_free_port(settings, step)
    prepare.save(settings, spec, step.draft.key)
    return revisions.record(settings.paths, spec, "up", str(fleet.path), step.compared.declared)


def _on_a_free_port(settings: Settings, step: Step) -> ServiceSpec:
    """The spec, on another port where a stranger took the one nobody named while others were started."""
    if step.service.entry.port or reservations.can_listen(step.spec.host, step.spec.port):
        return step.spec
    with reservations.locked(settings.paths):
        others = reservations.neighbours(settings.paths, but=[step.name])
        spec = prepare.place(settings, step.draft, step.weights, others, before=step.spec)
        reservations.claim(settings.paths, spec)
    return spec


def _stop_and_remember(settings: Settings, status: ServiceStatus | None) -> None:
    """Stop what is there; what was served by hand becomes a revision, so that there is a way back to it."""
    if status is None:
        return
    known = revisions.current(settings.paths, status.spec)
    revision = known or revisions.record(settings.paths, status.spec, "by hand")
    if status.phase == "ready":
        revisions.mark_ready(settings.paths, revision)
    services.stop_service(settings, status.spec.name)


def _with_way_back(paths: Paths, spec: ServiceSpec, error: MdeployError) -> MdeployError:
    """The error, and beside its own hint the rollback, where there is something to go back to."""
    if not any(one.ready and not revisions.same(one.spec, spec) for one in revisions.listing(paths, spec.name)):
        return error
    back = f"mdeploy rollback {spec.name} brings back what worked"
    return type(error)(error.message, hint=f"{error.hint}; {back}" if error.hint else back)


# back


def rollback(settings: Settings, name: str, number: int | None, listener: Listener) -> Outcome:
    """Apply an earlier revision of a service as it was, and restart it; itself a new revision.

    The key is the one the service has now: going back never opens a service that asks for one.
    Raises NotFoundError without such a revision, and what keeps it from being started.
    """
    with _alone(settings.paths, listener.say):
        status = _status(settings, name)
        target = revisions.wanted(settings.paths, status.spec, number)
        spec = _with_kept_key(settings.paths, target.spec)
        _check(settings.paths, spec, status)
        listener.say(f"{name}: going back to revision {target.number}")
        _stop_and_remember(settings, status)
        prepare.save(settings, spec, None)
        origin = f"rollback to {target.number}"
        revision = revisions.record(settings.paths, spec, origin, target.file, target.declared)
        ready = services.launch(settings, name, listener.status)
        revisions.mark_ready(settings.paths, revision)
        return Outcome(name, "rolled back", (), revision.number, ready)


def _with_kept_key(paths: Paths, spec: ServiceSpec) -> ServiceSpec:
    file = credentials.key_file(paths, spec.name)
    if not file.exists() or spec.secrets:
        return spec
    probe = dataclasses.replace(spec.probe, bearer=credentials.variable(of_vllm=spec.is_vllm))
    secrets = credentials.secrets_of(paths, spec.name, of_vllm=spec.is_vllm)
    return dataclasses.replace(spec, secrets=secrets, probe=probe)


def _check(paths: Paths, spec: ServiceSpec, status: ServiceStatus) -> None:
    """What can be known to fail before the present service is stopped."""
    reservations.check(spec, reservations.neighbours(paths, but=[spec.name]))
    for key in spec.secrets.values():
        first_key(Path(key))
    if not Path(spec.argv[0]).exists():
        hint = "mdeploy engines install vllm" if spec.is_vllm else ""
        raise ConfigError(f"the engine of that revision is gone: {spec.argv[0]}", hint=hint)
    if status.pid is None or status.spec.port != spec.port:
        check_port(spec.host, spec.port)


@contextlib.contextmanager
def _alone(paths: Paths, say: Say) -> Iterator[None]:
    """One `up` or `rollback` at a time; the second waits, and then sees what the first has done."""
    state.make_private(paths.services)
    with (paths.services / ".applying").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            say(f"another mdeploy up or rollback is at work (process {lock.read().strip()}): waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
