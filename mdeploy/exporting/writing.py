"""Writes what a renderer returned, and never over something that it did not write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mdeploy.errors import ConfigError, UsageError
from mdeploy.export.rendered import MARK, Rendered
from mdeploy.supervise import state


def write(files: Iterable[Rendered], directory: Path) -> tuple[Path, ...]:
    """Write the files below a directory that is made where it is missing; returns their paths.

    Raises UsageError before the first is written where one would replace somebody else's file.
    """
    wanted = {directory / file.name: file for file in files}
    for path in wanted:
        _check_ours(path)
    for path, file in wanted.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "choose another place with -o"
            raise ConfigError(f"cannot create {path.parent}: {error.strerror}", hint=hint) from error
        data = file.content if isinstance(file.content, bytes) else file.content.encode()
        state.write_atomically(path, data, file.mode)
    return tuple(wanted)


def _check_ours(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint="-o takes the file to write")
    if not path.exists() or path.suffix == ".whl":
        return
    try:
        with path.open("rb") as file:
            ours = file.read(len(MARK)) == MARK.encode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="choose another place with -o") from error
    if not ours:
        raise UsageError(f"{path} was not written by mdeploy export", hint="choose another place with -o, or move it")
