"""YAML as values that still know their line, so that a mistake can be shown where it was made.

Knows nothing of services: only mappings, lists and scalars, and what is wrong with them as such.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdeploy.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    import yaml

KeyPath = tuple[str | int, ...]
"""How to get to a value: ("services", "chat", "args", 2)."""

_MAX_BYTES, _MAX_VALUES = 1 << 20, 20_000
_MAX_DIGITS = 18
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong in a file, and where."""

    at: KeyPath
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """A file of nested values. `raw` has every scalar as it was typed: 007 is 007, not 7."""

    file: str
    data: Any
    lines: Mapping[KeyPath, int]
    raw: Mapping[KeyPath, str]
    mistakes: tuple[Mistake, ...]

    def mistake(self, at: KeyPath, text: str) -> Mistake:
        """Something wrong with the value at `at`, or with the nearest value around it."""
        return Mistake(at, self.line(at), text)

    def line(self, at: KeyPath) -> int:
        """Where a value stands; for one that is not there, what it should be in."""
        while at and at not in self.lines:
            at = at[:-1]
        return self.lines.get(at, 1)

    def error(self, mistakes: Iterable[Mistake]) -> ConfigError:
        """All mistakes at once, in the order of the lines."""
        ordered = sorted(set(mistakes), key=lambda m: (m.line, list(map(str, m.at)), m.text))
        text = "\n".join(f"{self.file}:{m.line}: {_title(m.at)}{m.text}" for m in ordered)
        return ConfigError(text, hint="README, section “Many services in one file”, shows one with every key")


def dotted(at: KeyPath) -> str:
    """A path as people write it: services.chat.args[2]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


def _title(at: KeyPath) -> str:
    return f"{dotted(at)}: " if at else ""


def read(path: Path, shown: str) -> Document:
    """Parse one file; `shown` is what messages call it.

    Raises NotFoundError without a file, ConfigError for what is no YAML at all. Smaller mistakes,
    duplicate keys above all, are collected in the document.
    """
    import yaml

    text = _text(path, shown)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        reader = _Reader(loader)
        data = reader.value(node, ()) if node else None
    except yaml.YAMLError as error:
        raise _syntax(error, text, shown) from error
    except RecursionError as error:
        raise ConfigError(f"{shown} is nested too deeply") from error
    if node is None:
        raise ConfigError(f"{shown} is empty", hint="it needs `version: 1` and `services:`")
    return Document(shown, data, reader.lines, reader.raw, tuple(reader.mistakes))


def _text(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {shown}", hint="write one, or name it: -f FILE") from error
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{shown} is larger than {_MAX_BYTES >> 20} MiB: that is no file of services")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line}: not UTF-8 text", hint=f"iconv -t UTF-8 {shown}") from error


def _syntax(error: yaml.YAMLError, text: str, shown: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    position = getattr(error, "position", None)
    line = mark.line + 1 if mark else text[:position].count("\n") + 1 if position is not None else 1
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    context = getattr(error, "context", None)
    hint = "YAML is indented with blanks, never with tabs" if "\\t" in problem else ""
    return ConfigError(f"{shown}:{line}: no valid YAML: {context + ': ' if context else ''}{problem}", hint=hint)


@dataclass
class _Reader:
    """Walks the nodes once: values, their lines, and what is wrong with them."""

    loader: yaml.SafeLoader
    lines: dict[KeyPath, int] = field(default_factory=dict)
    raw: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    _open: list[yaml.Node] = field(default_factory=list)
    _flat: set[int] = field(default_factory=set)

    def value(self, node: yaml.Node, at: KeyPath) -> Any:
        import yaml

        line = self.lines.setdefault(at, node.start_mark.line + 1)
        if len(self.lines) > _MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "it has far too many values", node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, at)
        if node.tag not in _PLAIN_TAGS:
            return self._wrong(at, line, f"the tag {node.tag} is not known here")
        if any(node is outer for outer in self._open):
            return self._wrong(at, line, "it contains itself")
        self._open.append(node)
        found = self._mapping(node, at) if isinstance(node, yaml.MappingNode) else self._sequence(node, at)
        self._open.pop()
        return found

    def _wrong(self, at: KeyPath, line: int, text: str) -> None:
        self.mistakes.append(Mistake(at, line, text))

    def _sequence(self, node: yaml.Node, at: KeyPath) -> list[Any]:
        return [self.value(item, (*at, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        import yaml

        if id(node) not in self._flat:  # an anchor is met once for every alias
            self._find_duplicates(node, at)
            self.loader.flatten_mapping(node)  # `<<: *anchor`: what is merged in comes first, own keys win
            self._flat.add(id(node))
        found: dict[str, Any] = {}
        last = {key.value: (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        for name, (key, value) in last.items():
            below = (*at, name)
            self.lines[below] = key.start_mark.line + 1
            found[name] = self.value(value, below)
        return found

    def _find_duplicates(self, node: yaml.MappingNode, at: KeyPath) -> None:
        import yaml

        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._wrong(at, line, "a key must be one word, not a list or a mapping")
            elif key.value in first and key.tag != _MERGE_TAG:
                self._wrong((*at, key.value), line, f"given twice, in line {first[key.value]} too")
            else:
                first[key.value] = line

    def _scalar(self, node: yaml.ScalarNode, at: KeyPath) -> Any:
        self.raw[at] = node.value
        problem = _unusable(node.value)
        value = None if problem else self._constructed(node, at)
        if isinstance(value, int) and len(node.value) > _MAX_DIGITS:
            problem = "far too large a number"
        if isinstance(value, float) and not math.isfinite(value):
            problem = "must be a finite number"
        return self._wrong(at, self.lines[at], problem) if problem else value

    def _constructed(self, node: yaml.ScalarNode, at: KeyPath) -> Any:
        """The value YAML makes of a scalar; dates and the like stay text."""
        try:
            value = self.loader.construct_object(node)
        except ValueError:  # a month 13, a number of 5000 digits
            return node.value
        return value if value is None or isinstance(value, (bool, int, float)) else node.value


def _unusable(text: str) -> str:
    """What no process, header or file name can hold."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return ""


def as_json(data: Any) -> bytes:
    """The values for a parser that takes JSON."""
    return json.dumps(data).encode()
