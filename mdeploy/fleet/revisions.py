"""What was applied to a service, and whether it ever became ready: what a rollback goes back to.

    HOME/services/NAME/revisions/0007.json     the last ten, and the last one that was ready

No key is in there: a spec names the file a key lies in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mdeploy.errors import NotFoundError
from mdeploy.paths import Paths
from mdeploy.specs import ServiceSpec, from_json, to_json
from mdeploy.supervise import state

_KEPT = 10


@dataclass(frozen=True, slots=True)
class Revision:
    """A spec that was applied. `declared` is what the file said then, key by key; `file` is empty where none did.

    `since` is Unix time in seconds. `origin` says in words how it came about.
    """

    number: int
    since: float
    origin: str
    spec: ServiceSpec
    file: str = ""
    declared: Mapping[str, str] = field(default_factory=dict)
    ready: bool = False


def listing(paths: Paths, name: str) -> tuple[Revision, ...]:
    """All revisions of a service, the oldest first; one that cannot be read is passed over."""
    found = (_read(path) for path in sorted(_directory(paths, name).glob("[0-9]*.json")))
    return tuple(sorted((one for one in found if one), key=lambda revision: revision.number))


def current(paths: Paths, spec: ServiceSpec) -> Revision | None:
    """The revision that `spec` came from; None where it was served by hand since."""
    known = listing(paths, spec.name)
    return known[-1] if known and same(known[-1].spec, spec) else None


def same(one: ServiceSpec, other: ServiceSpec) -> bool:
    """Whether two specs are one but for the key, which `mdeploy keys` gives and takes."""
    return _without_key(one) == _without_key(other)


def _without_key(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, secrets={}, probe=replace(spec.probe, bearer=None))


def record(
    paths: Paths, spec: ServiceSpec, origin: str, file: str = "", declared: Mapping[str, str] | None = None
) -> Revision:
    """Write down that a spec is being applied; it counts for a rollback once it was ready."""
    numbers = [int(path.stem) for path in _directory(paths, spec.name).glob("[0-9]*.json") if path.stem.isdecimal()]
    made = Revision(max(numbers, default=0) + 1, time.time(), origin, spec, file, declared or {})
    _write(paths, made)
    _forget(paths, spec.name)
    return made


def mark_ready(paths: Paths, revision: Revision) -> None:
    """It has answered: a rollback may go back to it."""
    if not revision.ready:
        _write(paths, replace(revision, ready=True))


def wanted(paths: Paths, spec: ServiceSpec, number: int | None) -> Revision:
    """The revision to go back to: `number`, or the last one that was ready and is not what is there now.

    Raises NotFoundError, which lists those there are.
    """
    known = listing(paths, spec.name)
    if number is not None:
        found = next((revision for revision in known if revision.number == number), None)
    else:
        found = next((r for r in reversed(known) if r.ready and not same(r.spec, spec)), None)
    if found is None:
        what = f"no revision {number}" if number is not None else "no earlier revision that was ready"
        numbers = ", ".join(f"{r.number}{'' if r.ready else ' (never ready)'}" for r in known)
        raise NotFoundError(
            f"{spec.name} has {what}",
            hint=f"there are {numbers}: --to N" if numbers else "revisions are made by mdeploy up",
        )
    return found


def _directory(paths: Paths, name: str) -> Path:
    return paths.service(name) / "revisions"


def _read(path: Path) -> Revision | None:
    try:
        return from_json(Revision, path.read_bytes())
    except (OSError, ValueError):
        return None


def _write(paths: Paths, revision: Revision) -> None:
    directory = _directory(paths, revision.spec.name)
    state.make_private(directory)
    state.write_atomically(directory / f"{revision.number:04}.json", to_json(revision))


def _forget(paths: Paths, name: str) -> None:
    """Remove all but the last ten and the last that was ready."""
    known = listing(paths, name)
    ready = [revision.number for revision in known if revision.ready][-1:]
    for revision in known[:-_KEPT]:
        if revision.number not in ready:
            (_directory(paths, name) / f"{revision.number:04}.json").unlink(missing_ok=True)
