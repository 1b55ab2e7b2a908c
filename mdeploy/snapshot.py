"""What a service is, remembered before it is prepared anew, so that it can be put back as it was.

Preparing writes its spec, its key, its revisions and, for a unit, what systemd was told of it.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdeploy import credentials, dispatch
from mdeploy.paths import Paths
from mdeploy.supervise import state
from mdeploy.supervise.state import ServiceFiles
from mdeploy.systemd import manager
from mdeploy.systemd.units import DROPIN, GPU_UNIT

Contents = Mapping[Path, tuple[bytes, int]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A service at one moment; `contents` are bytes and mode of each of its files there was."""

    paths: Paths
    name: str
    contents: Contents
    was_known: bool
    ran_detached: bool

    def is_changed(self) -> bool:
        """Whether anything is written otherwise by now."""
        return _contents(self.paths, self.name) != self.contents

    def restore(self) -> None:
        """Write back what there was, and start a service that ran in the background; does not wait for it."""
        now = _contents(self.paths, self.name)
        for path in now.keys() - self.contents.keys():
            path.unlink()
        for path, (data, mode) in self.contents.items():
            if now.get(path) != (data, mode):
                state.write_atomically(path, data, mode)
        files = ServiceFiles(self.paths, self.name)
        if not self.was_known:
            shutil.rmtree(files.directory, ignore_errors=True)
        if self.ran_detached and not files.is_supervised():
            dispatch.begin(files)


def take(paths: Paths, name: str) -> Snapshot:
    """Remember a service, also one that is not known yet."""
    files = ServiceFiles(paths, name)
    detached = files.is_supervised() and manager.find(paths.home, name) is None
    return Snapshot(paths, name, _contents(paths, name), files.directory.exists(), detached)


def _contents(paths: Paths, name: str) -> Contents:
    found = {}
    for path in _paths(paths, name):
        if path.is_file():
            found[path] = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    return found


def _paths(paths: Paths, name: str) -> Iterator[Path]:
    directory = paths.service(name)
    yield directory / "spec.json"
    yield from sorted((directory / "revisions").glob("*.json"))
    yield credentials.key_file(paths, name)
    unit = manager.find(paths.home, name)
    if unit is not None:
        units = manager.directory(unit.scope)
        yield units / f"{unit.name}.d" / DROPIN
        yield units / GPU_UNIT
