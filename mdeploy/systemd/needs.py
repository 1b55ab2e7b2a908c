"""What a service reads from the disk, found out without knowing its kind: so it works for kinds to come.

Every absolute path among its words and variables that exists is needed, the environment of its
interpreter too, and whatever symbolic links in there point to: ModelScope's cache is made of them,
and a uv or pyenv interpreter lives in somebody's home.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdeploy.specs import ServiceSpec
from mdeploy.systemd.units import HIDDEN, Program, is_below

_MOST_LINKS = 40  # as the kernel's own limit


@dataclass(frozen=True, slots=True)
class Needs:
    """Paths a service reads: its program, the data it is told to serve, and what its variables name."""

    program: str
    data: tuple[str, ...] = ()
    named: tuple[str, ...] = ()

    @property
    def trees(self) -> tuple[str, ...]:
        """All that must be there, the environment of the program included."""
        interpreters = (tree for path in self.data if _is_interpreter(path) for tree in environment(path))
        return tuple(dict.fromkeys([*environment(self.program), *self.data, *interpreters, *self.named]))


def of_program() -> Program:
    """This very mdeploy: its environment, the interpreter below it, and its source where it is elsewhere."""
    source = str(Path(__file__).parent.parent)
    return Program(sys.executable, tuple(dict.fromkeys([*environment(sys.executable), source])))


def of_service(spec: ServiceSpec) -> Needs:
    """What a service reads beside its own directory and its keys, both of which the unit gives it."""
    own = (spec.cwd, *spec.secrets.values(), "/dev", "/proc", "/sys")
    words = (word.partition("=")[2] if word.startswith("--") else word for word in spec.argv[1:])
    values = (part for value in spec.env.values() for part in value.split(os.pathsep))
    return Needs(spec.argv[0], tuple(_existing(words, own)), tuple(_existing(values, own)))


def _existing(texts: Iterable[str], but: Sequence[str]) -> Iterator[str]:
    paths = dict.fromkeys(os.path.normpath(text) for text in texts if text.startswith("/") and text != "/")
    return (path for path in paths if os.path.exists(path) and not is_below(path, but))  # noqa: PTH110 any text


def _is_interpreter(path: str) -> bool:
    """A Python that a service is told to use beside its own: the workers of an app have one of the user's."""
    return Path(path).name.startswith("python") and os.access(path, os.X_OK) and Path(path).is_file()


def environment(python: str) -> tuple[str, ...]:
    """The trees an interpreter is read from: at every link on the way to the real one, and below a virtual one."""
    found: list[str] = []
    path = Path(python)
    for _ in range(_MOST_LINKS):
        found.append(str(_prefix(path)))
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    found += [str(_prefix(Path(home) / "python")) for home in _pyvenv_homes(found)]
    found += _editable(Path(found[0]))
    return tuple(dict.fromkeys(tree for tree in found if tree not in ("/", "/usr")))


def _prefix(program: Path) -> Path:
    return program.parent.parent if program.parent.name == "bin" else program.parent


def _pyvenv_homes(prefixes: Iterable[str]) -> Iterator[str]:
    """`home` of pyvenv.cfg: where a virtual environment finds its standard library (PEP 405)."""
    for prefix in prefixes:
        config = Path(prefix) / "pyvenv.cfg"
        if config.is_file():
            pairs = (line.partition("=") for line in config.read_text(errors="replace").splitlines())
            yield from (value.strip() for key, _, value in pairs if key.strip() == "home")


def _editable(prefix: Path) -> list[str]:
    """Source trees installed in place: an environment names them in direct_url.json (PEP 610)."""
    import json
    from urllib.parse import unquote, urlsplit

    found = []
    for path in sorted(prefix.glob("lib/python3*/site-packages/*.dist-info/direct_url.json")):
        noted = json.loads(path.read_text())
        if noted.get("dir_info", {}).get("editable") and not path.parent.name.startswith("mdeploy-"):
            found.append(unquote(urlsplit(noted["url"]).path))
    return found


# what a sandbox hides


def binds(trees: Iterable[str], hidden: Sequence[str] = HIDDEN) -> tuple[str, ...]:
    """What must be bound into a sandbox for these paths to be read there: each where a hidden tree is entered."""
    found: list[str] = []
    for tree in trees:
        for path in _followed(tree):
            entry = entrance(path, hidden)
            if entry and not is_below(entry, found):
                found.append(entry)
    return _outermost(found)


def entrance(path: str, hidden: Sequence[str]) -> str | None:
    """The path as it is once its resolution enters a hidden tree; None where it never does.

    A link in an open place may lead into a hidden one: what is bound there need not be resolved further.
    """
    for _ in range(_MOST_LINKS):
        if is_below(path, hidden):
            return path
        link = next((p for p in (*reversed(Path(path).parents), Path(path)) if p.is_symlink()), None)
        if link is None:
            return None
        rest = path[len(str(link)) :]
        path = os.path.normpath(f"{link.parent / link.readlink()}{rest}")
    return None


def _followed(tree: str) -> Iterator[str]:
    """A tree, and every link in it that leads out of it. Environments are not walked: they hold 50 000 files."""
    yield tree
    if not Path(tree).is_dir() or (Path(tree) / "pyvenv.cfg").is_file() or (Path(tree) / "bin").is_dir():
        return
    for directory, names, files in os.walk(tree):
        for name in (*names, *files):
            path = Path(directory, name)
            if path.is_symlink():
                target = os.path.normpath(path.parent / path.readlink())
                if not is_below(target, (tree,)):
                    yield target


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(p for p in paths if not is_below(p, (other for other in paths if other != p))))
