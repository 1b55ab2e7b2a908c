"""Models in the ModelScope cache: where they are, whether they are whole, and how a failure leaves no trace.

The layout is the SDK's own, so the stock SDK, vLLM, funasr and swift find what we fetch:

    CACHE/models/OWNER--NAME/snapshots/REVISION/…    SDK >= 1.38
    CACHE[/hub]/models/OWNER/NAME_/…                 SDK <= 1.37, dots in the name as ___
    CACHE/.lock/file_….lock                          one lock a file, shared with the stock SDK
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mdeploy.errors import ConfigError, MdeployError
from mdeploy.hub.listing import RepoFile
from mdeploy.hub.refs import DEFAULT_REVISION
from mdeploy.specs import ModelRef

PARTIAL = ".incomplete"
# Lies in a directory from the first byte of a transfer to its success, so that a model of which
# some files arrived is never taken for a whole one.
MARKER = f".mdeploy{PARTIAL}"


def locate(ref: ModelRef, cache_dir: Path) -> Path | None:
    """The directory of a model that is whole, judged without the network; None where it must be fetched."""
    return next((path for path in _candidates(ref, cache_dir.absolute()) if _is_model(path)), None)


def snapshot_dir(ref: ModelRef, cache_dir: Path) -> Path:
    """Where the SDK puts a model."""
    return cache_dir.absolute() / "models" / ref.id.replace("/", "--") / "snapshots" / ref.revision


def destination(ref: ModelRef, cache_dir: Path) -> Path:
    """Where a download goes: to what is there, whole or in part, else to the SDK's layout of today."""
    found = locate(ref, cache_dir) or next(filter(_has_entries, _candidates(ref, cache_dir.absolute())), None)
    return found or snapshot_dir(ref, cache_dir)


def flaw(directory: Path) -> str | None:
    """What shows that a directory holds a part of a model only: a partial file, a missing shard; else None."""
    partial = next(directory.rglob(f"*{PARTIAL}"), None)
    if partial is not None:
        return f"{partial.relative_to(directory)} is not complete"
    for index in sorted(directory.glob("model*.safetensors.index.json")):
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
            missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} cannot be read"
        if missing:
            return f"{missing[0]} is missing"
    return None


def present(files: Iterable[RepoFile], target: Path) -> dict[str, int]:
    """Bytes on disk that a transfer can use, by path: whole files, judged by their size, and partial ones."""
    found = {}
    for file in files:
        whole, partial = _size(target / file.path), _size(partial_path(target, file.path)) or 0
        found[file.path] = file.size if whole == file.size else partial if partial <= file.size else 0
    return found


def progress_on_disk(files: Iterable[RepoFile], target: Path) -> int:
    """Bytes of these files on disk, finished or partial: grows for as long as a transfer gets anywhere."""
    return sum(_arrived(file, target) for file in files)


def partial_path(target: Path, path: str) -> Path:
    """The file the SDK collects bytes in until the hash is right."""
    return target / f"{path}{PARTIAL}"


def check_space(files: Iterable[RepoFile], target: Path) -> None:
    """Raise MdeployError where the file system cannot hold what is still missing."""
    missing = sum(max(0, file.size - _arrived(file, target)) for file in files)
    try:
        disk = shutil.disk_usage(_existing(target))
    except OSError as error:
        raise storage_error(error, target) from error
    # Pseudo and some network file systems have no size at all.
    if missing > disk.free and disk.total:
        raise MdeployError(
            f"not enough room under {target}: {missing / 2**30:.3f} GiB to fetch, {disk.free / 2**30:.3f} GiB free",
            hint="free some space, or choose another place with --cache-dir or MODELSCOPE_CACHE",
        )


def storage_error(error: OSError, path: Path) -> MdeployError:
    """An error of the file system with its path and the way out."""
    where = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MdeployError(
            f"no space left on the disk of {where}",
            hint="free some space and run the same command again: what has arrived is kept",
        )
    reason = error.strerror or str(error)
    return ConfigError(
        f"cannot write the model to {where}: {reason}", hint="choose another place with --cache-dir or --local-dir"
    )


@contextlib.contextmanager
def clean_after_failure(ref: ModelRef, files: tuple[RepoFile, ...], target: Path, cache_dir: Path) -> Iterator[None]:
    """Make the target directory, and take back what was made if the transfer within fails.

    Bytes that can be resumed stay, together with the marker; then directories and locks do too.
    Raises ConfigError where the directory cannot be made.
    """
    places = {target / file.path for file in files} | {_lock_file(ref, file, cache_dir) for file in files}
    new = [path for path in places if not os.path.lexists(path)]
    directories = _absent({(target / file.path).parent for file in files} | {cache_dir / ".lock", target})
    try:
        with _as_storage_error(target):
            target.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if not progress_on_disk(files, target):
            _discard(target, files, new)
        for directory in directories:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise
    (target / MARKER).unlink(missing_ok=True)


def mark(target: Path) -> None:
    """Say that a transfer into `target` has begun."""
    (target / MARKER).touch()


@contextlib.contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def _discard(target: Path, files: tuple[RepoFile, ...], new: list[Path]) -> None:
    """Remove what holds no bytes: empty files of this call, the marker, locks nobody holds."""
    for path in (target / MARKER, *(partial_path(target, file.path) for file in files), *new):
        if _size(path) == 0:
            _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    """Unlink a file while holding its lock; filelock looks again when what it locked has lost its name."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _lock_file(ref: ModelRef, file: RepoFile, cache_dir: Path) -> Path:
    """The SDK's lock of one file (DownloadManager._lock_path of modelscope_hub 0.5)."""
    key = "\0".join(("modelscope-hub-download-lock-v2", "file", "model", ref.id, file.path))
    return cache_dir / ".lock" / f"file_{hashlib.sha256(key.encode()).hexdigest()}.lock"


def _absent(wanted: set[Path]) -> list[Path]:
    """These directories and their parents that do not exist yet, deepest first."""
    missing = {path for leaf in wanted for path in (leaf, *leaf.parents) if not os.path.lexists(path)}
    return sorted(missing, key=lambda path: len(path.parts), reverse=True)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _candidates(ref: ModelRef, cache: Path) -> Iterator[Path]:
    yield snapshot_dir(ref, cache)
    owner, _, name = ref.id.partition("/")
    for base in (cache / "models", cache / "hub" / "models"):
        path = base / owner / name.replace(".", "___")
        if _old_revision(path) == ref.revision:
            yield path


def _old_revision(path: Path) -> str:
    """The revision of an old directory; `.mv` holds it as `Revision:R,CreatedAt:…`."""
    try:
        text = (path / ".mv").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return DEFAULT_REVISION
    return text.partition(",")[0].removeprefix("Revision:").strip() or DEFAULT_REVISION


def _is_model(path: Path) -> bool:
    has_config = any((path / name).is_file() for name in ("config.json", "configuration.json"))
    return has_config and flaw(path) is None


def _has_entries(path: Path) -> bool:
    try:
        return any(path.iterdir())
    except OSError:
        return False


def _arrived(file: RepoFile, target: Path) -> int:
    return _size(target / file.path) or _size(partial_path(target, file.path)) or 0


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
