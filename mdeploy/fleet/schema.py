"""The keys of mdeploy.yaml: their types, the short forms people write, and the words for a wrong one.

What a value means for a service, and whether two of them agree, is decided in checks.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mdeploy.fleet.document import Document, KeyPath, Mistake, as_json
from mdeploy.specs import AppWish, EmbedWish, RestartPolicy
from mdeploy.wishes import bytes_of

VERSION = 1

Kind = Literal["llm", "embed", "gme", "asr", "app"]

_NO_OTHER_KEYS: Mapping[str, str] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """`id` is a hub id or a directory; `source` a directory with the weights of `id`."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    id: str | None = None
    revision: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class GpusEntry:
    """These devices, that many, all, or none; `shared` says on purpose that others use them too."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    ids: tuple[int, ...] | None = None
    count: int | None = None
    shared: bool | None = None
    which: Literal["all", "none"] | None = None


@dataclass(frozen=True, slots=True)
class LimitsEntry:
    """What a service may take on the disk."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    log_bytes: int | None = None
    log_files: int | None = None


@dataclass(frozen=True, slots=True)
class AuthEntry:
    """Where the API key comes from: generate, file:PATH or env:VARIABLE."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    key: str | None = None


@dataclass(frozen=True, slots=True)
class LifecycleEntry:
    """Deadlines in seconds, and what happens when the engine ends without being asked."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    ready_timeout: float | None = None
    drain: float | None = None
    restart: RestartPolicy | None = None


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """One service, or the defaults of all; None where a key is not given."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    kind: Kind | None = None
    model: ModelEntry | None = None
    recipe: str | None = None
    engine: str | None = None
    host: str | None = None
    port: int | None = None
    insecure: bool | None = None
    gpus: GpusEntry | None = None
    tp: int | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: str | None = None
    dtype: str | None = None
    args: tuple[str, ...] | None = None
    env: Mapping[str, str] | None = None
    handler: tuple[str, ...] | None = None
    python: str | None = None
    path: tuple[str, ...] | None = None
    workers_per_gpu: int | None = None
    batch: int | None = None
    batch_cost: float | None = None
    max_wait_ms: float | None = None
    timeout: float | None = None
    queue: int | None = None
    max_body: int | None = None
    cors: tuple[str, ...] | None = None
    config: Mapping[str, Mapping[str, Any]] | None = None
    backend: Literal["mdeploy", "vllm"] | None = None
    max_length: int | None = None
    dimensions: int | None = None
    batch_tokens: int | None = None
    attention: str | None = None
    compile: bool | None = None
    truncate: bool | None = None
    token_ids: str | None = None
    instruction: str | None = None
    limits: LimitsEntry | None = None
    auth: AuthEntry | None = None
    lifecycle: LifecycleEntry | None = None
    depends_on: tuple[str, ...] | None = None

    def app_wish(self) -> AppWish:
        """What it says of an app."""
        gpus = self.gpus or GpusEntry()
        same = {name: getattr(self, name) for name in _OF_APP_WISH}
        return AppWish(
            handlers=self.handler, paths=self.path, gpus=gpus.which or gpus.ids, gpu_count=gpus.count, **same
        )

    def embed_wish(self) -> EmbedWish:
        """What it says of an embedding service."""
        gpus = self.gpus or GpusEntry()
        same = {name: getattr(self, name) for name in _OF_EMBED_WISH}
        return EmbedWish(gpus=gpus.which or gpus.ids, gpu_count=gpus.count, **same)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The whole file."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _NO_OTHER_KEYS
    version: int
    services: Mapping[str, ServiceEntry]
    defaults: ServiceEntry = field(default_factory=ServiceEntry)


_OF_NUMBERS = ("workers_per_gpu", "batch", "batch_cost", "max_wait_ms", "timeout", "queue", "max_body")
_OF_APP_WISH = ("python", *_OF_NUMBERS, "cors", "config")
_OF_EMBED_WISH = tuple(f.name for f in dataclasses.fields(EmbedWish) if not f.name.startswith("gpu"))

_PARTS: Mapping[str, type] = {
    "model": ModelEntry,
    "gpus": GpusEntry,
    "limits": LimitsEntry,
    "auth": AuthEntry,
    "lifecycle": LifecycleEntry,
}
_DURATION = "seconds, or a duration like 90s or 10m"
_SIZE = "bytes, or a size like 64MiB"
_EXPECTED = {
    "model": "owner/name, a directory, or {id: …, revision: …, source: …}",
    "gpus": '"0,1", [0, 1], {ids: [0, 1]}, {count: 2}, all or none',
    "which": "all or none",
    "ready_timeout": _DURATION,
    "timeout": _DURATION,
    "drain": _DURATION,
    "log_bytes": _SIZE,
    "max_body": _SIZE,
    "services": "a mapping of names to services",
    "kind": "llm, embed, gme or app (asr is to come)",
    "backend": "mdeploy or vllm",
    "restart": "always, on-failure or never",
}
_EXPECTED_OF_TYPE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "mapping_type": "a mapping",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}


def parse(document: Document) -> tuple[FileEntry | None, tuple[Mistake, ...]]:
    """The entries of a document and everything that is wrong with their shape.

    Wrong values are left out of the entries, so that what they stand beside can be checked as
    well; None where nothing is left to check.
    """
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(FileEntry)
    data = _normal_file(document)
    try:
        return adapter.validate_json(as_json(data), strict=True), ()
    except ValidationError as error:
        problems = [(tuple(e["loc"]), e["type"]) for e in error.errors()]
    mistakes = tuple(document.mistake(at, _words(document, data, at, problem)) for at, problem in problems)
    try:
        rest = _without(data, [at for at, _ in problems])
        return adapter.validate_json(as_json(rest), strict=True), mistakes
    except ValidationError:
        return None, mistakes


# short forms


def _normal_file(document: Document) -> Any:
    """The values with every short form written out; what is no short form stays as it is, to be refused."""
    data = document.data
    if not isinstance(data, dict):
        return data
    found = {name: value for name, value in data.items() if not name.startswith("x-")}
    if isinstance(found.get("services"), dict):
        services = found["services"]
        found["services"] = {name: _normal(document, ("services", name), value) for name, value in services.items()}
    if "defaults" in found:
        found["defaults"] = _normal(document, ("defaults",), found["defaults"])
    return found


def _normal(document: Document, at: KeyPath, entry: Any) -> Any:
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        return entry
    found = {name: _typed(document, (*at, name), value) for name, value in entry.items() if value is not None}
    for name, short in _SHORT_FORMS.items():
        if name in found:
            found[name] = short(found[name])
    return found


def _typed(document: Document, at: KeyPath, value: Any) -> Any:
    """Scalars whose place wants text, a duration or a size as that: `revision: 1.0` is no number."""
    if isinstance(value, dict):
        present = {name: _typed(document, (*at, name), inner) for name, inner in value.items()}
        return present if at[-1] == "env" else {k: v for k, v in present.items() if v is not None}
    if isinstance(value, list):
        return [_typed(document, (*at, index), inner) for index, inner in enumerate(value)]
    if value is None:
        return None
    word = next(part for part in reversed(at) if isinstance(part, str))
    is_text = word in _TEXTS or "env" in at[:-1]
    convert = _CONVERTED.get(word, _as_it_is)
    converted = document.raw[at] if is_text else convert(document.raw[at])
    return value if converted is None else converted


def _as_it_is(text: str) -> None:
    """Nothing to convert: the value YAML found is the value."""


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s?)?", text.strip())
    try:
        parts = [float(part or 0) for part in match.groups()] if match and text.strip() else None
    except ValueError:
        return None
    return sum(size * part for size, part in zip((3600, 60, 1), parts, strict=True)) if parts else None


def _model(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _gpus(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}( *, *[0-9]{1,9})*", value.strip()):
        return {"ids": [int(part) for part in value.split(",")]}
    if value in ("all", "none"):
        return {"which": value}
    return {"ids": value} if isinstance(value, list) else value


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_SHORT_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "model": _model,
    "gpus": _gpus,
    "depends_on": _names,
    "handler": _names,
    "path": _names,
    "cors": _names,
}
_CONVERTED: Mapping[str, Callable[[str], Any]] = {
    "ready_timeout": _seconds,
    "drain": _seconds,
    "log_bytes": bytes_of,
    "max_body": bytes_of,
    "timeout": _seconds,
}
_TEXTS = frozenset(
    [
        "kind",
        "recipe",
        "engine",
        "host",
        "max_model_len",
        "dtype",
        "args",
        "depends_on",
        "key",
        "restart",
        "model",
        "id",
        "revision",
        "source",
        "handler",
        "python",
        "path",
        "cors",
        "backend",
        "attention",
        "token_ids",
        "instruction",
    ]
)


# words


def _words(document: Document, data: Any, at: KeyPath, problem: str) -> str:
    if problem == "unexpected_keyword_argument":
        return _unknown(at)
    if problem == "missing":
        return f"is missing: write `version: {VERSION}`" if at == ("version",) else "is missing"
    word = next((part for part in reversed(at) if isinstance(part, str)), "")
    by_type = _EXPECTED_OF_TYPE.get(problem, "something else")
    expected = _EXPECTED.get(word, by_type) if at and at[-1] == word else by_type
    return f"must be {expected}, not {_shown(document, data, at)}"


def _shown(document: Document, data: Any, at: KeyPath) -> str:
    """A wrong value as it was typed; never one that may be a secret."""
    value = data
    for part in at:
        value = value[part]
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "what is there" if "auth" in at or "env" in at else repr(document.raw.get(at, value))[:80]


def _unknown(at: KeyPath) -> str:
    known = known_keys(at[:-1])
    near = difflib.get_close_matches(str(at[-1]).lower().replace("-", "_"), known, n=1)
    return f"unknown key, did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"


def known_keys(at: KeyPath) -> tuple[str, ...]:
    """The keys that may stand in the mapping at `at`."""
    inner = at[2:] if at[:1] == ("services",) else at[1:]
    kind = _PARTS.get(str(inner[0]), ServiceEntry) if inner else ServiceEntry
    return tuple(f.name for f in dataclasses.fields(kind if at else FileEntry))


def _without(data: Any, paths: Iterable[KeyPath]) -> Any:
    """The data without the values at these paths, and with what must be there."""
    if not isinstance(data, dict):
        return data
    for at in filter(None, paths):
        _remove(data, at)
    return {"version": VERSION, "services": {}, **data}


def _remove(data: Any, at: KeyPath) -> None:
    """Take one value out; a wrong item of a list takes the list with it."""
    keys = [part for part in at if isinstance(part, str)]
    for part in keys[:-1]:
        data = data.get(part, {})
    data.pop(keys[-1], None)
