"""Which engine environments exist. An environment counts once its engine.json is there, and only then."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UsageError
from mdeploy.specs import Engine, from_json, to_json

_RECORD = "engine.json"
_PARTIAL = ".installing-"
_REMOVING = ".removing-"

_ASK_VERSION = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
print(json.dumps([version("vllm"), version("torch"), sys.executable]))
"""


def listing(root: Path) -> tuple[Engine, ...]:
    """All engines under `root`, by name."""
    records = sorted(root.glob(f"[!.]*/{_RECORD}")) if root.is_dir() else []
    return tuple(_read(path) for path in records)


def _read(path: Path) -> Engine:
    try:
        return from_json(Engine, path.read_bytes())
    except (OSError, ValueError) as error:
        hint = f"mdeploy engines rm {path.parent.name}"
        raise ConfigError(f"engine record {path} cannot be read: {error}", hint=hint) from error


def find(root: Path, wanted: str | None, has_gpu: Callable[[], bool]) -> Engine:
    """The engine called `wanted` (a name, or `vllm[@VERSION]`), or the best one for this machine.

    Without a name a CUDA engine is taken where there is a GPU, else a CPU one; the newest wins.
    `has_gpu` is only asked where there is a choice.
    Raises NotFoundError, which names the command that installs one.
    """
    engines = listing(root)
    matching = [engine for engine in engines if wanted is None or _matches(engine, wanted)]
    if not matching:
        what = f"engine {wanted!r} is not installed" if wanted else "vLLM is not installed"
        known = ", ".join(engine.name for engine in engines)
        install = "mdeploy engines install vllm"
        raise NotFoundError(what, hint=f"{install}   (installed: {known})" if known else install)
    choice = len({engine.variant for engine in matching}) > 1
    first = "cuda" if choice and has_gpu() else "cpu"
    return max(matching, key=lambda engine: (engine.variant == first, _sortable(engine.version)))


def _matches(engine: Engine, wanted: str) -> bool:
    name, _, version = wanted.partition("@")
    right_version = not version or engine.version.split("+")[0] == version.split("+")[0]
    return wanted == engine.name or (name == engine.engine and right_version)


def _sortable(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def inspect(python: Path, name: str | None = None, *, managed: bool) -> Engine:
    """Ask an interpreter for the vLLM beside it (metadata only, vLLM is not imported).

    Raises ConfigError where it does not run or has no vLLM.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK_VERSION], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} does not run: {error}", hint="name a Python interpreter") from error
    if done.returncode != 0:
        raise ConfigError(f"{python} is no usable Python: {done.stderr.strip()[-200:]}")
    import json

    version, torch, executable = json.loads(done.stdout.strip().splitlines()[-1])
    if not version:
        raise ConfigError(f"{python} has no vllm installed", hint="mdeploy engines install vllm")
    variant = "cpu" if "+cpu" in torch or "+cpu" in version else "cuda"
    default = f"vllm-{variant}-{version.split('+')[0]}"
    return Engine(name or default, "vllm", version, variant, executable, managed)  # type: ignore[arg-type]


def adopt(root: Path, python: Path, name: str | None = None) -> Engine:
    """Use an environment somebody else made; we only write down where it is."""
    engine = inspect(python, managed=False)
    others = {other.name for other in listing(root) if other.python != engine.python}
    adopted = name or f"{engine.name}-adopted"
    number = 2
    while name is None and adopted in others:
        adopted, number = f"{engine.name}-adopted-{number}", number + 1
    if adopted in others:
        raise UsageError(f"engine {adopted} already exists", hint=f"mdeploy engines rm {adopted}")
    engine = dataclasses.replace(engine, name=adopted)
    with building(root, engine.name) as directory:
        (directory / _RECORD).write_bytes(to_json(engine))
    return engine


def finish(directory: Path, name: str) -> Engine:
    """Record a freshly built environment; `directory` is still its building place."""
    engine = inspect(directory / "bin" / "python", name, managed=True)
    final = directory.parent / name / "bin" / "python"
    size = sum(entry.stat().st_blocks * 512 for entry in _files(directory))
    record = Engine(name, engine.engine, engine.version, engine.variant, str(final), True, size)
    (directory / _RECORD).write_bytes(to_json(record))
    return record


def _files(directory: Path) -> Iterator[os.DirEntry[str]]:
    for entry in os.scandir(directory):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path))
        else:
            yield entry


@contextmanager
def building(root: Path, name: str) -> Iterator[Path]:
    """A directory to build engine `name` in: renamed into place at the end, gone at any failure.

    A lock keeps two builders apart; what a killed builder left is cleared by the next.
    Raises MdeployError while another process builds the same engine.
    """
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{_PARTIAL}{name}"
    with (root / f".lock-{name}").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)  # uv, should it outlive us, keeps the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MdeployError(f"another process is installing {name}", hint="wait for it to end") from error
        try:
            _remove(partial)
            partial.mkdir()
            yield partial
            _remove(root / name)
            partial.rename(root / name)
        finally:
            _remove(partial)


def remove(root: Path, name: str) -> Engine:
    """Forget an engine; an environment that we built is deleted with it. Raises NotFoundError."""
    record = root / name / _RECORD
    if name.startswith(".") or "/" in name or not record.is_file():
        raise NotFoundError(f"no engine {name!r}", hint="mdeploy engines ls")
    try:
        engine = _read(record)
    except ConfigError:  # removing is what mends an unreadable record
        engine = Engine(name, "vllm", "unknown", "cpu", str(root / name / "bin" / "python"), True)
    _remove(root / name)
    return engine


def _remove(directory: Path) -> None:
    """Delete a tree so that a crash in the middle leaves nothing that looks alive."""
    if not directory.exists():
        return
    doomed = directory.with_name(f"{_REMOVING}{directory.name.lstrip('.')}-{os.getpid()}")
    directory.rename(doomed)
    shutil.rmtree(doomed)
