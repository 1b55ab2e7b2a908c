"""The interpreter that runs the workers of an app of our own: which one, and whether it has what they import.

mdeploy needs no torch itself. Its workers use that of the user (`--python`), of our own environment where it is
there, or of the newest vLLM that is installed. Nothing is imported to find out: metadata of packages is read.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdeploy import gpus
from mdeploy.engines import store as engine_store
from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.paths import Paths
from mdeploy.serving import source
from mdeploy.serving.source import Interpreter

_PATIENCE_S = 60.0
_ASK = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, slots=True)
class Chosen:
    """An interpreter that can run the workers; `reason` says why this one where nobody named it."""

    python: Interpreter
    reason: str = ""


def choose(paths: Paths, wanted: str | None, base: Path | None, packages: Mapping[str, str], extra: str) -> Chosen:
    """The interpreter of the workers, which has these packages in these versions or newer ("" for any).

    `extra` is the extra of mdeploy that brings them. Raises NotFoundError for an interpreter that is not there,
    ConfigError where it lacks something, or where there is none at all.
    """
    named, reason = (wanted, "") if wanted else _usual(paths, packages, extra)
    found = source.check(source.interpreter(named, base), (), ())
    _check(found, packages)
    return Chosen(found, reason)


def _usual(paths: Paths, packages: Mapping[str, str], extra: str) -> tuple[str, str]:
    if all(importlib.util.find_spec(name) for name in packages if name != "pillow"):
        return sys.executable, ""
    try:
        engine = engine_store.find(paths.engines, None, lambda: bool(gpus.probe()))
    except NotFoundError as error:
        hint = f"pip install 'mdeploy[{extra}]', or mdeploy engines install vllm, or --python /path/to/env"
        raise ConfigError("there is no torch here that could run the model", hint=hint) from error
    return engine.python, f"workers run in the environment of {engine.name}: mdeploy's own has no torch"


def _check(python: Interpreter, packages: Mapping[str, str]) -> None:
    lacking = dict(_lacking(_versions(python.path, list(packages)), packages))
    if lacking:
        wanted = " ".join(f"'{name}>={packages[name]}'" if packages[name] else name for name in lacking)
        hint = f"{python.path} -m pip install {wanted}, or --python another one"
        raise ConfigError(f"{python.path} has {', '.join(lacking.values())}", hint=hint)


def _lacking(found: Mapping[str, str | None], packages: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names of packages, each with what is wrong with it."""
    for name, least in packages.items():
        version = found.get(name)
        if version is None:
            yield name, f"no {name}"
        elif least and _sortable(version) < _sortable(least):
            yield name, f"{name} {version}, {least} or newer is needed"


def _sortable(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _versions(python: str, names: Sequence[str]) -> dict[str, str | None]:
    try:
        words = [python, "-I", "-c", _ASK, *names]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S, check=True, cwd="/")
        found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"{python} does not say what is installed in it: {error}", hint="try it by hand") from error
    return found
