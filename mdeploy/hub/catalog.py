"""Which models a directory holds, and what is in them: the mirror's view of a disk. Knows nothing of HTTP.

Found under the root: `OWNER/NAME/…` as people copy models, and the two layouts of a ModelScope
cache (see `store`). Nothing outside the root is ever opened, whatever links say, and neither are
hidden files or models that are still arriving.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdeploy.hub.listing import RepoFile, fingerprint
from mdeploy.hub.refs import DEFAULT_REVISION, is_id, is_revision
from mdeploy.hub.store import PARTIAL, flaw

# A part of many models; every other hidden name is somebody's bookkeeping (.git, .msc, .cache) or secret.
_VISIBLE = frozenset({".gitattributes", ".gitignore"})
_BLOCK = 1 << 20
# A client asks for the files of a listing one after the other; the disk need not be walked for each.
_FRESH_S = 2.0
# What makes OWNER/NAME a model and not just two directories: a mirror must not give away a home directory.
_CONFIGS = frozenset({"config.json", "configuration.json", "model_index.json"})
_WEIGHTS = frozenset({".safetensors", ".gguf", ".onnx", ".bin", ".pt", ".pth"})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One model at one revision. `trees` are its directories, `commit` names its content."""

    id: str
    revision: str
    path: Path
    files: tuple[RepoFile, ...]
    commit: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def file(self, path: str) -> RepoFile | None:
        """A file by its path; None for one that is not part of the model."""
        return next((file for file in self.files if file.path == path), None)

    @property
    def trees(self) -> tuple[str, ...]:
        """Directories within the model, as a hub lists them."""
        parents = {str(parent) for file in self.files for parent in Path(file.path).parents}
        return tuple(sorted(parents - {"."}))


class Catalog:
    """The models under `root`, looked up anew each time, so that a model copied in is served at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._hashes = _Hashes()
        self._recent: dict[tuple[str, str], tuple[float, Snapshot]] = {}

    def ids(self) -> tuple[str, ...]:
        """Every model that can be served, sorted."""
        found = {name for base in self._bases() for name in _ids_in(base, is_root=base == self.root)}
        return tuple(sorted(name for name in found if self.revisions(name)))

    def revisions(self, model: str) -> Mapping[str, Path]:
        """Directory of each revision of a model; none for a model that is unknown or still arriving."""
        if not is_id(model):
            return {}
        places = dict(reversed([*self._places(model)]))
        return {revision: path for revision, path in sorted(places.items()) if flaw(path) is None}

    def snapshot(self, model: str, revision: str) -> Snapshot | None:
        """A model at a branch or commit, every file hashed: slow once, then a matter of `stat`.

        Raises OSError for a file that cannot be read.
        """
        taken, found = self._recent.get((model, revision), (0.0, None))
        if found is None or time.monotonic() - taken > _FRESH_S:
            found = self._find(model, revision)
            if found is not None:
                self._recent[model, revision] = (time.monotonic(), found)
        return found

    def _find(self, model: str, revision: str) -> Snapshot | None:
        known = self.revisions(model)
        if revision in known:
            return self._read(model, revision, known[revision])
        if len(revision) != 40:
            return None
        every = (self._read(model, name, path) for name, path in known.items())
        return next((found for found in every if found.commit == revision), None)

    def _read(self, model: str, revision: str, directory: Path) -> Snapshot:
        entries = sorted(_walk(directory, self.root, (directory,)))
        files = tuple(RepoFile(str(path.relative_to(directory)), *self._hashes.of(path)) for path in entries)
        return Snapshot(model, revision, directory, files, revision if len(revision) == 40 else fingerprint(files))

    def _bases(self) -> tuple[Path, ...]:
        return (self.root, self.root / "models", self.root / "hub" / "models")

    def _places(self, model: str) -> Iterator[tuple[str, Path]]:
        """(revision, directory) of every copy of a model, the preferred one first."""
        owner, _, name = model.partition("/")
        for base in self._bases():
            for path in _directories(base / f"{owner}--{name}" / "snapshots"):
                if is_revision(path.name):
                    yield from self._inside(path.name, path)
        for base in self._bases():
            for spelling in dict.fromkeys((name, name.replace(".", "___"))):
                if _looks_like_model(base / owner / spelling):
                    yield from self._inside(DEFAULT_REVISION, base / owner / spelling)

    def _inside(self, revision: str, path: Path) -> Iterator[tuple[str, Path]]:
        real = path.resolve()
        if real.is_dir() and real.is_relative_to(self.root) and any(_walk(real, self.root, (real,))):
            yield revision, real


class _Hashes:
    """sha256 of files, computed once for each (path, size, mtime, inode)."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}
        self._busy: dict[str, threading.Lock] = {}

    def of(self, path: Path) -> tuple[int, str]:
        """(size, sha256); a second asker waits for the first instead of reading the file again."""
        with self._busy.setdefault(str(path), threading.Lock()):
            stat = path.stat()
            key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if key not in self._known:
                self._known[key] = _sha256(path)
            return stat.st_size, self._known[key]


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _ids_in(base: Path, *, is_root: bool) -> Iterator[str]:
    for owner in _directories(base):
        if "--" in owner.name:
            yield owner.name.replace("--", "/", 1)
        if is_root and owner.name in ("models", "hub"):
            continue
        for model in _directories(owner):
            yield f"{owner.name}/{model.name.replace('___', '.')}"


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if not child.name.startswith(".") and child.is_dir())
    except OSError:
        return []


def _looks_like_model(path: Path) -> bool:
    return any(e.name in _CONFIGS or Path(e.name).suffix in _WEIGHTS for e in _scan(path))


def _walk(directory: Path, root: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Regular files below a directory, links followed as far as they stay under `root`."""
    for entry in _scan(directory):
        path = Path(entry.path)
        real = path.resolve() if entry.is_symlink() else path
        if entry.is_symlink() and not real.is_relative_to(root):
            continue
        if entry.is_file():
            yield path
        elif entry.is_dir() and real not in above:
            yield from _walk(path, root, (*above, real))


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if _is_visible(entry.name)]
    except OSError:
        return []


def _is_visible(name: str) -> bool:
    hidden = name.startswith(".") and name not in _VISIBLE
    return not hidden and not name.endswith(PARTIAL) and name.isprintable() and "\\" not in name
