"""What a user named as handlers, understood: files, classes and modules, and the interpreter that shall run them.

No code of the user's is imported here; their interpreter is asked whether it could.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdeploy.errors import ConfigError, NotFoundError, UsageError
from mdeploy.paths import expand
from mdeploy.serving import syntax

_OLDEST = (3, 10)
_PATIENCE_S = 60.0
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

# An interpreter too old for our syntax must still be able to say how old it is.
_ASK = """
import sys
print("mdeploy-python %d.%d %s" % (sys.version_info[0], sys.version_info[1], sys.executable))
if sys.version_info >= (3, 10):
    exec(compile(open(sys.argv[1], encoding="utf-8").read(), sys.argv[1], "exec"))
"""


@dataclass(frozen=True, slots=True)
class Source:
    """One handler argument: a file (absolute) or a module, and the class in it; None means all classes of a file."""

    file: Path | None
    module: str | None
    cls: str | None

    def __str__(self) -> str:
        where = str(self.file or self.module)
        return f"{where}:{self.cls}" if self.cls else where

    @property
    def title(self) -> str:
        """What it is called where nobody named it: the class, else the file, else the directory of an app.py."""
        if self.cls or self.file is None:
            return self.cls or str(self.module)
        return self.file.parent.name if self.file.stem in ("app", "main", "handler", "server") else self.file.stem

    @property
    def shown(self) -> str:
        """The short form people read in tables."""
        where = self.file.name if self.file else str(self.module)
        return f"{where}:{self.cls}" if self.cls else where


def understand(text: str, base: Path | None = None) -> Source:
    """FILE.py, FILE.py:Class or package.mod:Class; relative files start at `base`, else where we are.

    Raises UsageError for what is neither, NotFoundError for a file that is not there.
    """
    where, _, cls = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    if where.endswith(".py"):
        if cls and not _NAME.fullmatch(cls):
            raise UsageError(f"{cls!r} in {text} is no name of a class", hint="FILE.py:Class, or FILE.py for all")
        return Source(_file(where, base), None, cls or None)
    if _NAME.fullmatch(where) and _NAME.fullmatch(cls):
        return Source(None, where, cls)
    raise _neither(text, base)


def _file(text: str, base: Path | None) -> Path:
    path = expand(text, base)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise NotFoundError(f"{text} {what}", hint="mdeploy init app NAME writes one to begin with")
    if ":" in str(path.resolve()):
        raise UsageError(f"{path.resolve()}: a path with a colon cannot be told from a class", hint="rename it")
    return path.resolve()


def _neither(text: str, base: Path | None) -> UsageError:
    forms = "FILE.py:Class, FILE.py, package.mod:Class, or a recipe (.yaml)"
    directory = expand(text, base)
    if directory.is_dir():
        file = next((name for name in ("recipe.yaml", "app.py") if (directory / name).is_file()), "FILE.py")
        return UsageError(f"{text} is a directory", hint=f"mdeploy serve app {text.rstrip('/')}/{file}")
    if _NAME.fullmatch(text):
        return UsageError(f"{text} names no class", hint=f"{text}:Class, if it is a module; else {forms}")
    return UsageError(f"{text!r} is no handler", hint=forms)


def search_path(sources: Sequence[Source], paths: Sequence[str], base: Path | None) -> tuple[str, ...]:
    """Directories for the workers' sys.path: those named, those of the files, and where we are if a module is there."""
    named = [_directory(text, base) for text in paths]
    beside = [str(source.file.parent) for source in sources if source.file]
    here = str(base or Path.cwd())
    tops = [source.module.partition(".")[0] for source in sources if source.module]
    found = [here] if any(_has(here, top) for top in tops) else []
    return tuple(dict.fromkeys([*named, *beside, *found]))


def _directory(text: str, base: Path | None) -> str:
    path = expand(text, base)
    if not path.is_dir():
        raise NotFoundError(f"--path {text} is no directory", hint="it goes to the front of the workers' sys.path")
    return str(path.resolve())


def _has(directory: str, module: str) -> bool:
    return Path(directory, module).is_dir() or Path(directory, f"{module}.py").is_file()


# the interpreter


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python by its own account: `path` is what it calls itself, which leads past the shims of pyenv and its like."""

    path: str
    version: str


def interpreter(text: str | None, base: Path | None = None) -> str:
    """The absolute path of an interpreter: a program, its environment, or a command on PATH; ours without one.

    A symbolic link stays one: it is what makes an environment virtual. Raises NotFoundError.
    """
    if text is None:
        return sys.executable
    path = expand(text, base)
    if (path / "bin" / "python").is_file():
        return str(path / "bin" / "python")
    on_path = None if "/" in text else shutil.which(text)
    if on_path:
        return str(Path(on_path).absolute())
    if not path.is_file():
        raise NotFoundError(f"there is no interpreter {text}", hint="--python /path/to/env/bin/python")
    return str(path)


def check(python: str, sources: Sequence[Source], paths: Sequence[str]) -> Interpreter:
    """Have the interpreter read the handlers, none of them run; returns what it is.

    Raises ConfigError for what is no Python or too old, and for sources that do not parse; NotFoundError for a
    class or module that is not there.
    """
    found, seen = _ask(python, sources, paths)
    for source in sources:
        if source.file:
            _check_file(source, seen["files"][str(source.file)])
        elif source.module and source.module.partition(".")[0] in seen["missing"]:
            hint = "--path DIR names where it is; --python, in whose environment"
            raise NotFoundError(f"{python} finds no module {source.module.partition('.')[0]}", hint=hint)
    return found


def _check_file(source: Source, seen: dict[str, Any]) -> None:
    if "error" in seen:
        raise ConfigError(f"{source.file}:{seen['line']}: {seen['error']}", hint="mend that line and serve it again")
    if source.cls and source.cls.partition(".")[0] not in seen["names"] and not seen["open"]:
        near = difflib.get_close_matches(source.cls, seen["names"], n=1)
        hint = f"did you mean {near[0]}?" if near else "its classes are found by FILE.py alone"
        raise NotFoundError(f"there is no {source.cls} in {source.file}", hint=hint)


def _ask(python: str, sources: Sequence[Source], paths: Sequence[str]) -> tuple[Interpreter, dict[str, Any]]:
    wanted = {
        "files": list(_files(sources)),
        "modules": [source.module.partition(".")[0] for source in sources if source.module],
        "paths": list(paths),
    }
    lines, errors = _run([python, "-I", "-c", _ASK, str(Path(syntax.__file__)), json.dumps(wanted)], python)
    told = next((line.split(" ", 2)[1:] for line in lines if line.startswith("mdeploy-python ")), None)
    if told is None:
        raise ConfigError(f"{python} is no Python interpreter", hint="--python /path/to/env/bin/python")
    if tuple(map(int, told[0].split("."))) < _OLDEST:
        raise ConfigError(f"{python} is Python {told[0]}, workers need 3.10 or newer", hint="--python another one")
    return Interpreter(told[1] or python, told[0]), _answer(python, [*lines, *errors])


def _files(sources: Iterable[Source]) -> Iterator[str]:
    return (str(source.file) for source in sources if source.file)


def _run(words: Sequence[str], python: str) -> tuple[list[str], list[str]]:
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{python} gives no answer in {_PATIENCE_S:.0f} s", hint="is it an interpreter?") from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it prints no text"
        raise ConfigError(f"{python} cannot be run: {why}", hint="--python /path/to/env/bin/python") from error
    return done.stdout.splitlines(), done.stderr.splitlines() if done.returncode else []


def _answer(python: str, lines: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(lines[-1])
    except ValueError as error:
        raise ConfigError(f"{python} cannot read the handlers: {lines[-1]}", hint="try it by hand") from error
    return found if isinstance(found, dict) else {}
