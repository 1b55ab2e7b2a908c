"""A user's source on its way to other machines: the directories of its Python path, copied into one that Ray sends.

Virtual environments, hidden directories and byte code stay behind; what is too large to be source is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdeploy.errors import ConfigError

MOST_BYTES = 64 << 20
_MOST_FILES = 20_000
_LEFT_OUT = ("__pycache__", "node_modules")
_ELSEWHERE = re.compile(r"[^\s\"'()]*/working_dir_files/\w+/source(\d+)/")
"""Where Ray unpacks a parcel."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A directory that holds all source: `paths` and the files of `handlers` are relative to it.

    `origins` says where each of the paths lies on this machine.
    """

    root: Path
    paths: tuple[str, ...]
    handlers: tuple[str, ...]
    origins: tuple[str, ...]

    def translate(self, text: str) -> str:
        """A text from another machine with the paths of this one, so that people find the line that is meant."""
        return _ELSEWHERE.sub(lambda found: f"{self.origins[int(found[1])]}/", text)

    def at_home(self, file: str) -> str:
        """Where a file, named by its place below the parcel, lies on this machine; empty where that is elsewhere."""
        for path, origin in zip(self.paths, self.origins, strict=True):
            if file.startswith(f"{path}/"):
                return str(Path(origin) / file.removeprefix(f"{path}/"))
        return ""


def pack(handlers: Sequence[str], paths: Sequence[str], root: Path) -> Parcel:
    """Copy the source of `handlers` (FILE.py[:Class] absolute, or package.mod:Class) and its Python path to `root`.

    Raises ConfigError for what is more than source, and for files that cannot be read.
    """
    beside = [str(Path(_file(spec)).parent) for spec in handlers if _is_file(spec)]
    origins = _distinct([*paths, *beside])
    budget = [MOST_BYTES, _MOST_FILES]
    for number, origin in enumerate(origins):
        _copy(Path(origin), root / _place(number), budget)
    homes = {origin: _place(number) for number, origin in enumerate(origins)}
    return Parcel(
        root,
        tuple(homes.values()),
        tuple(_moved(spec, homes) if _is_file(spec) else spec for spec in handlers),
        origins,
    )


def digest(root: Path) -> str:
    """What tells two versions of the source apart."""
    found = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file():
            found.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def _place(number: int) -> str:
    return f"source{number}"


def _is_file(spec: str) -> bool:
    return _file(spec).endswith(".py")


def _file(spec: str) -> str:
    return spec.partition(":")[0]


def _distinct(paths: Sequence[str]) -> tuple[str, ...]:
    """Every directory once, in their order."""
    return tuple(dict.fromkeys(str(Path(path).resolve()) for path in paths))


def _moved(spec: str, homes: dict[str, str]) -> str:
    path, colon, cls = spec.partition(":")
    file = Path(path).resolve()
    return f"{homes[str(file.parent)]}/{file.name}{colon}{cls}"


def _copy(source: Path, target: Path, budget: list[int]) -> None:
    target.mkdir(parents=True)
    for file in _files(source):
        place = target / file.relative_to(source)
        try:
            budget[0] -= file.stat().st_size
            budget[1] -= 1
            if min(budget) < 0:
                raise _too_large(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}", hint="other machines need it too") from error


def _files(source: Path) -> Iterator[Path]:
    for top, directories, files in os.walk(source):
        here = Path(top)
        directories[:] = sorted(name for name in directories if _is_source(here / name))
        yield from (here / name for name in sorted(files) if _is_sent(here / name))


def _is_sent(file: Path) -> bool:
    """Not what hides (.env holds secrets), and not what Python makes itself."""
    return file.is_file() and not file.name.startswith(".") and file.suffix != ".pyc"


def _is_source(directory: Path) -> bool:
    hidden = directory.name.startswith(".") or directory.name in _LEFT_OUT
    return not hidden and not (directory / "pyvenv.cfg").exists()


def _too_large(source: Path) -> ConfigError:
    return ConfigError(
        f"{source} and the other directories of the handlers are more than {MOST_BYTES >> 20} MiB or {_MOST_FILES} "
        "files: too much to be sent to other machines as source",
        hint="keep the handler in a directory of its own, and name weights with --model",
    )
