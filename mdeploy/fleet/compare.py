"""What a file asks for beside what a service has: only a difference here restarts anything.

Compared is what was declared and what it stands for (engine, recipe, model directory, key), never
what follows from the state of the machine: free memory changes by itself, and restarts nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from mdeploy import credentials
from mdeploy.credentials import Key
from mdeploy.drafts import Draft
from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.fleet import revisions
from mdeploy.fleet.file import Service
from mdeploy.fleet.revisions import Revision
from mdeploy.paths import Paths
from mdeploy.specs import ServiceStatus
from mdeploy.supervise import state
from mdeploy.supervise.secrets import first_key
from mdeploy.supervise.state import ServiceFiles

Difference = Literal["new", "changed", "unchanged", "gone"]

_IRRELEVANT = ("insecure", "gpus.shared")
"""Keys that permit something and change nothing of the service."""

_NO_KEY = "none"


@dataclass(frozen=True, slots=True)
class Change:
    """One key with its value then and now; None where it has none."""

    key: str
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Compared:
    """One service of a file beside the one of the same name in this home."""

    name: str
    difference: Difference
    changes: tuple[Change, ...]
    declared: Mapping[str, str]
    status: ServiceStatus | None
    revision: Revision | None


def compare(paths: Paths, service: Service, asked: Draft, directory: Path | None) -> Compared:
    """What would change if the file were applied. `directory` is where the model is, or would be, if it has one."""
    declared = dict(_declared(service, asked, directory))
    status = present(paths, service.name)
    if status is None:
        return Compared(service.name, "new", (), declared, None, None)
    revision = revisions.current(paths, status.spec)
    if revision is None:
        by_hand = Change("spec", "made by hand", "made by the file")
        return Compared(service.name, "changed", (by_hand,), declared, status, None)
    before = {**revision.declared, "auth.key": _key_in_use(status)}
    changes = _changes(before, declared)
    return Compared(service.name, "changed" if changes else "unchanged", changes, declared, status, revision)


def present(paths: Paths, name: str) -> ServiceStatus | None:
    """The service of this name; None where there is none that could go on as it is."""
    try:
        return state.status(ServiceFiles(paths, name))
    except (NotFoundError, ConfigError):  # a damaged spec is replaced like one that is not there
        return None


def gone(paths: Paths, file: str, names: tuple[str, ...]) -> tuple[ServiceStatus, ...]:
    """Services that still run and came from this file, in which they no longer are."""
    found = (present(paths, name) for name in state.names(paths) if name not in names)
    running = (status for status in found if status and status.phase != "stopped")
    return tuple(status for status in running if _came_from(paths, status, file))


def _came_from(paths: Paths, status: ServiceStatus, file: str) -> bool:
    revision = revisions.current(paths, status.spec)
    return revision is not None and revision.file == file


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[Change, ...]:
    keys = dict.fromkeys((*after, *before))
    return tuple(Change(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k))


def _declared(service: Service, asked: Draft, directory: Path | None) -> Iterator[tuple[str, str]]:
    """The entry key by key, and what stands behind its names."""
    flat = dict(_flat("", service.entry))
    for name in _IRRELEVANT:
        flat.pop(name, None)
    yield from {"kind": "llm", **flat, "host": asked.host}.items()
    yield from asked.stands_for().items()
    if directory is not None:
        yield "directory", str(directory)
    yield "auth.key", _key_asked(asked.key)


def _flat(prefix: str, entry: Any) -> Iterator[tuple[str, str]]:
    pairs = entry.items() if isinstance(entry, Mapping) else ((f.name, getattr(entry, f.name)) for f in fields(entry))
    for name, value in pairs:
        if is_dataclass(value) or isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif value is not None and value != ():
            yield f"{prefix}{name}", shlex.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _key_asked(key: Key | None) -> str:
    if key is None:
        return _NO_KEY
    return "a new one" if key.origin == "generate" else credentials.fingerprint(key.value)


def _key_in_use(status: ServiceStatus) -> str:
    """Which key the service asks for now, whoever gave it one."""
    for file in status.spec.secrets.values():
        try:
            return credentials.fingerprint(first_key(Path(file)))
        except ConfigError:
            return "lost"
    return _NO_KEY
