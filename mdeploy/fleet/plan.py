"""From a file to what would be done: every service looked up, compared, fetched and placed, nothing started.

All that can be refused is refused here, for all services at once, before any of them is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mdeploy import prepare, reservations, weights
from mdeploy.drafts import Draft, Weights
from mdeploy.errors import DoesNotFitError, MdeployError
from mdeploy.fleet import compare, file
from mdeploy.fleet.compare import Change, Compared
from mdeploy.fleet.file import Fleet, Service
from mdeploy.paths import Paths
from mdeploy.reservations import Holder, Neighbours
from mdeploy.settings import Settings
from mdeploy.specs import Say, ServiceSpec, ServiceStatus
from mdeploy.supervise.ports import check_port

if TYPE_CHECKING:
    from mdeploy.hub.client import Progress

T = TypeVar("T")
_ACTIVE = ("starting", "ready", "unhealthy", "stopping")


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of progress: lines, bytes of a download, and looks at a service that starts."""

    say: Say
    download: Progress | None
    status: Callable[[ServiceStatus], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One service, ready to be applied. `keeps` says that it goes on with the spec it has."""

    service: Service
    compared: Compared
    draft: Draft
    weights: Weights
    spec: ServiceSpec
    keeps: bool

    @property
    def name(self) -> str:
        """The service's name."""
        return self.service.name

    @property
    def running(self) -> ServiceSpec | None:
        """The spec that runs now, if one does."""
        status = self.compared.status
        return status.spec if status and status.phase in _ACTIVE else None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A service that is looked up and fetched, and has no place yet."""

    service: Service
    compared: Compared
    draft: Draft
    weights: Weights

    @property
    def present(self) -> ServiceSpec | None:
        return self.compared.status.spec if self.compared.status else None

    @property
    def is_active(self) -> bool:
        return self.compared.status is not None and self.compared.status.phase in _ACTIVE


def compared(settings: Settings, fleet: Fleet, services: Sequence[Service]) -> tuple[tuple[Compared, Draft], ...]:
    """The services beside what is there. Raises what is wrong with any of them, all at once."""

    def one(service: Service) -> tuple[Compared, Draft]:
        draft = prepare.draft(settings, file.request(service, fleet.path))
        directory = weights.directory_of(settings, draft.model) if draft.model else None
        return compare.compare(settings.paths, service, draft, directory), draft

    return _each(services, one)


def steps(
    settings: Settings, fleet: Fleet, names: Collection[str], listener: Listener, *, dry_run: bool
) -> tuple[Step, ...]:
    """What is to be done for the services named (all without names) and those they depend on, in that order.

    Models are downloaded, GPUs and ports claimed until this process ends; neither with `dry_run`.
    """
    chosen = fleet.with_dependencies(names)
    looked_up = compared(settings, fleet, chosen)

    def fetched(service: Service) -> _Candidate:
        found, draft = looked_up[chosen.index(service)]
        model = prepare.fetch(settings, draft, dry_run=dry_run, progress=listener.download, say=listener.say)
        return _Candidate(service, found, draft, model)

    candidates = _each(chosen, fetched)
    with contextlib.nullcontext() if dry_run else reservations.locked(settings.paths):
        placed = _place_all(settings, fleet, candidates)
        for step in () if dry_run else placed:
            reservations.claim(settings.paths, step.spec)
    return placed


def _each(services: Sequence[Service], action: Callable[[Service], T]) -> tuple[T, ...]:
    """Do it for every service; what goes wrong is raised once all have had their turn, with file and line."""
    done: list[T] = []
    errors: list[MdeployError] = []
    for service in services:
        try:
            done.append(action(service))
        except MdeployError as error:
            errors.append(type(error)(f"{service.where}: {error.message}", hint=error.hint))
    if errors:
        first = errors[0]
        raise type(first)("\n".join(e.message for e in errors), hint=first.hint if len(errors) == 1 else _hints(errors))
    return tuple(done)


def _hints(errors: Iterable[MdeployError]) -> str:
    return "; ".join(dict.fromkeys(error.hint for error in errors if error.hint))


# places


def _place_all(settings: Settings, fleet: Fleet, candidates: Sequence[_Candidate]) -> tuple[Step, ...]:
    """Give every service its GPUs and port.

    What is unchanged keeps its own. Then those choose that were there before, and may keep theirs
    too; then the new ones.
    """
    outside = reservations.neighbours(settings.paths, but=fleet.names())
    inside = {holder.name: holder for holder in _inside(settings.paths, fleet, candidates)}
    done: dict[str, Step] = {}

    def one(service: Service) -> None:
        candidate = next(c for c in candidates if c.service is service)
        others = outside.joined(holder for holder in inside.values() if holder.name != service.name)
        done[service.name] = step = _placed(settings, candidate, candidates, others)
        inside[service.name] = reservations.holder(step.spec, f"in {fleet.shown}", _memory(step))

    order = sorted(candidates, key=lambda c: (c.compared.difference != "unchanged", c.present is None))
    _each([candidate.service for candidate in order], one)
    return tuple(done[candidate.service.name] for candidate in candidates)


def _inside(paths: Paths, fleet: Fleet, candidates: Sequence[_Candidate]) -> Iterable[Holder]:
    """What the services of the file hold before anything is placed: what they name, and what they keep."""
    applied = {candidate.service.name: candidate for candidate in candidates}
    for service in fleet.services:
        candidate = applied.get(service.name)
        status = candidate.compared.status if candidate else compare.present(paths, service.name)
        if status and (candidate is None or candidate.compared.difference == "unchanged"):
            yield reservations.holder(status.spec, f"in {fleet.shown}")
        else:
            ids = (service.entry.gpus and service.entry.gpus.ids) or ()
            yield Holder(service.name, f"in {fleet.shown}", ids, service.entry.port, named=bool(ids), is_new=True)


def _placed(settings: Settings, candidate: _Candidate, candidates: Sequence[_Candidate], others: Neighbours) -> Step:
    present, entry, found = candidate.present, candidate.service.entry, candidate.compared
    if present and found.difference == "unchanged" and _can_stay(candidate, present, others):
        return _step(candidate, found, present, keeps=True)
    if entry.port and entry.port not in _vacated(candidates):
        check_port(candidate.draft.host, entry.port)
    spec = prepare.place(settings, candidate.draft, candidate.weights, others, present)
    if present and found.difference == "unchanged":
        found = _moved(found, present, spec)
    return _step(candidate, found, spec, keeps=False)


def _step(candidate: _Candidate, found: Compared, spec: ServiceSpec, *, keeps: bool) -> Step:
    return Step(candidate.service, found, candidate.draft, candidate.weights, spec, keeps)


def _vacated(candidates: Sequence[_Candidate]) -> set[int]:
    """Ports that services of the file listen on now, and will not when these are restarted."""
    changed = (c for c in candidates if c.is_active and c.compared.difference != "unchanged")
    return {c.present.port for c in changed if c.present}


def _can_stay(candidate: _Candidate, present: ServiceSpec, others: Neighbours) -> bool:
    """Whether an unchanged service can go on where it was.

    One that runs does so, unless another service of the file is to have its devices by name.
    """
    if candidate.is_active:
        chosen = () if present.plan and present.plan.named else reservations.gpus_of(present)
        return not any(holder.named and holder.is_new and set(chosen) & set(holder.gpus) for holder in others.holders)
    try:
        reservations.check(present, others)
    except DoesNotFitError:
        return False
    free = present.port not in others.ports and reservations.can_listen(present.host, present.port)
    return free or candidate.service.entry.port is not None


def _moved(found: Compared, present: ServiceSpec, spec: ServiceSpec) -> Compared:
    """An unchanged service that lost its place to another while it was stopped."""
    pairs = (
        ("GPUs", reservations.gpus_of(present), reservations.gpus_of(spec)),
        ("port", present.port, spec.port),
    )
    changes = tuple(Change(key, _text(old), _text(new)) for key, old, new in pairs if old != new)
    return Compared(found.name, "changed", changes, found.declared, found.status, found.revision)


def _text(value: int | tuple[int, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _memory(step: Step) -> int:
    """Main memory that a service will take and has not taken yet."""
    plan = step.spec.plan
    return (plan.kv_cache_bytes or 0) if plan and not (step.keeps and step.running) else 0
