"""Whether the values of mdeploy.yaml make sense, each by itself and beside each other."""

from __future__ import annotations

import difflib
import graphlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from mdeploy import drafts, wishes
from mdeploy.errors import UsageError
from mdeploy.fleet.document import Document, KeyPath, Mistake
from mdeploy.fleet.schema import VERSION, FileEntry, GpusEntry, LifecycleEntry, LimitsEntry, ServiceEntry
from mdeploy.supervise import state

Problem = tuple[KeyPath, str]
"""What is wrong, at a path that starts at the service."""

_OF_LLM = ("engine", "tp", "gpu_memory_utilization", "max_model_len", "dtype", "args")
_OF_BOTH = ("python", "workers_per_gpu", "timeout", "max_body", "cors")
_OF_APP = (*_OF_BOTH, "handler", "path", "batch", "batch_cost", "max_wait_ms", "queue", "config")
_OF_EMBED = (
    *_OF_BOTH,
    *("engine", "tp", "dtype", "args"),
    *("backend", "max_length", "dimensions", "batch_tokens", "attention"),
    *("compile", "truncate", "token_ids", "instruction"),
)
_KEYS: Mapping[str, tuple[str, ...]] = {"llm": _OF_LLM, "app": _OF_APP, "embed": _OF_EMBED, "gme": _OF_EMBED}
"""What services of one kind have and not all others do."""

_FOREIGN = {
    "batch": "vLLM forms its batches by itself; their limit is args: [--max-num-seqs, '64']",
    "workers_per_gpu": "vLLM runs one process a GPU; for more of them declare more services",
}
_MONTH_S = 30 * 86400.0
_LEAST_LOG_BYTES = 64 << 10
_WILDCARDS = ("0.0.0.0", "::", "")

T = TypeVar("T")


def merged(defaults: T, own: T) -> T:
    """An entry with what it leaves open taken from the defaults; mappings key by key, lists as a whole."""
    return replace(own, **{f.name: _merged_value(f.name, defaults, own) for f in fields(own)})  # type: ignore[arg-type, type-var]


def _merged_value(name: str, defaults: Any, own: Any) -> Any:
    usual, special = getattr(defaults, name), getattr(own, name)
    if special is None or usual is None:
        return usual if special is None else special
    if name == "env":
        return {**usual, **special}
    # a model or devices of one's own replace those of the defaults as a whole
    return merged(usual, special) if name in ("limits", "auth", "lifecycle") else special


def effective(defaults: ServiceEntry, own: ServiceEntry) -> ServiceEntry:
    """A service with the defaults that its kind has; the others are for services of another kind."""
    return merged(replace(defaults, **dict.fromkeys(_foreign(own.kind or defaults.kind or "llm"))), own)


def _foreign(kind: str) -> tuple[str, ...]:
    """Keys that services of this kind do not have."""
    known = _KEYS.get(kind, ())
    return tuple(dict.fromkeys(name for names in _KEYS.values() for name in names if name not in known))


def check(document: Document, parsed: FileEntry, default_host: str) -> tuple[Mistake, ...]:
    """Everything that is wrong with entries of the right shape."""
    services = {name: effective(parsed.defaults, own) for name, own in parsed.services.items()}
    declared = document.data.get("services")  # those too whose entry was left out as wrong
    problems = [*_file(parsed, declared), *_names(services)]
    for name, entry in services.items():
        problems += [(("services", name, *at), text) for rule in _RULES for at, text in rule(entry)]
    problems += [*_ports(services, default_host), *_devices(services)]
    problems += [*_dependencies(services, list(declared) if isinstance(declared, dict) else [])]
    return tuple(document.mistake(_origin(document, at), text) for at, text in problems)


def order(services: Mapping[str, ServiceEntry]) -> tuple[str, ...]:
    """Names so that every service comes after those it depends on. Raises graphlib.CycleError."""
    known = {name: [d for d in entry.depends_on or () if d in services] for name, entry in services.items()}
    return tuple(graphlib.TopologicalSorter(known).static_order())


def _origin(document: Document, at: KeyPath) -> KeyPath:
    """Where the value at `at` of a service was written: there, or in the defaults."""
    usual = ("defaults", *at[2:])
    written = at in document.lines or at[:1] != ("services",) or len(at) < 3
    return at if written or usual not in document.lines else usual


def _file(parsed: FileEntry, declared: Any) -> Iterator[Problem]:
    if parsed.version != VERSION:
        yield ("version",), f"this mdeploy reads version {VERSION}, not {parsed.version}"
    if declared == {}:
        yield ("services",), "names no service"


def _names(services: Mapping[str, ServiceEntry]) -> Iterator[Problem]:
    for name in services:
        try:
            state.check_name(name)
        except UsageError as error:
            yield ("services", name), f"{error.message}: {error.hint}"


# one service


def _kind(entry: ServiceEntry) -> Iterator[Problem]:
    kind = entry.kind or "llm"
    if kind not in _KEYS:
        yield ("kind",), f"kind {kind} is not served by this version, {', '.join(_KEYS)} are"
        return
    for name in _foreign(kind):
        if getattr(entry, name) is not None:
            whose = ", ".join(other for other, names in _KEYS.items() if name in names)
            usual = f"belongs to services of kind {whose}"
            yield (name,), _FOREIGN.get(name, usual) if kind == "llm" else usual


def _model(entry: ServiceEntry) -> Iterator[Problem]:
    model = entry.model
    if entry.kind == "app":
        if not (entry.handler or entry.recipe):
            yield ("handler",), "is missing: FILE.py:Class, or a recipe"
        if model and not (model.id or model.source):
            yield ("model",), "names neither id nor source"
    elif not (entry.recipe or (model and (model.id or model.source))):
        yield ("model",), "is missing: owner/name, a directory, or a recipe"


def _app(entry: ServiceEntry) -> Iterator[Problem]:
    if entry.kind == "app":
        for name, text in wishes.problems(entry.app_wish()):
            yield tuple(name.split(".")), text


def _embed(entry: ServiceEntry) -> Iterator[Problem]:
    if entry.kind not in ("embed", "gme"):
        return
    wish = entry.embed_wish()
    for name, text in wishes.embed_problems(wish):
        yield (name,), text
    for name in wishes.foreign_to_backend(wish):
        yield (name,), f"does not go with backend: {wish.backend or 'mdeploy'}"
    if wish.backend == "vllm" and entry.gpus and entry.gpus.which:
        yield ("gpus",), f"{entry.gpus.which} does not go with backend: vllm: name ids, or a count"


def _numbers(entry: ServiceEntry) -> Iterator[Problem]:
    life, limits = entry.lifecycle or LifecycleEntry(), entry.limits or LimitsEntry()
    ranges: tuple[tuple[KeyPath, float | None, float, float], ...] = (
        (("port",), entry.port, 1, 65535),
        (("tp",), entry.tp, 1, 1024),
        (("lifecycle", "ready_timeout"), life.ready_timeout, 1, _MONTH_S),
        (("lifecycle", "drain"), life.drain, 0, _MONTH_S),
        (("limits", "log_bytes"), limits.log_bytes, _LEAST_LOG_BYTES, 1 << 50),
        (("limits", "log_files"), limits.log_files, 0, 1000),
    )
    for at, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            yield at, f"must be between {least:.0f} and {most:.0f}, not {value:g}"
    share = entry.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        yield ("gpu_memory_utilization",), f"must be more than 0 and at most 1, not {share:g}"


def _texts(entry: ServiceEntry) -> Iterator[Problem]:
    for name in ("host", "recipe", "engine", "max_model_len", "dtype", "python"):
        if getattr(entry, name) == "":
            yield (name,), "is empty"


def _gpus(entry: ServiceEntry) -> Iterator[Problem]:
    if entry.gpus is None:
        return
    ids, count = entry.gpus.ids, entry.gpus.count
    if sum(given is not None for given in (ids, count, entry.gpus.which)) != 1:
        yield ("gpus",), "takes either ids or count"
    elif entry.gpus.which and entry.kind in (None, "llm"):
        yield ("gpus",), f"{entry.gpus.which} is for services of another kind than llm: name ids, or a count"
    elif count is not None and not 1 <= count <= 1024:
        yield ("gpus",), f"count must be at least 1, not {count}"
    elif ids is not None and (not ids or min(ids) < 0 or len(set(ids)) != len(ids)):
        yield ("gpus",), "ids must be GPU numbers from 0, each once"
    elif entry.tp is not None and entry.tp != (count or len(ids or ())):
        yield ("tp",), f"is {entry.tp}, but gpus has {count or len(ids or ())}"
    if entry.gpus.shared and ids is None:
        yield ("gpus",), "only devices named by ids can be shared"


def _env(entry: ServiceEntry) -> Iterator[Problem]:
    env = entry.env or {}
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield ("env", name), "is no name of a variable"
        elif drafts.device_names({name: ""}):
            yield ("env", name), "is set by mdeploy: name devices with gpus: {ids: […]}"
    for name in drafts.secret_names(env):
        yield ("env", name), "sounds like a secret: those do not belong in this file; a key is declared by auth"


def _auth(entry: ServiceEntry) -> Iterator[Problem]:
    key = entry.auth.key if entry.auth else None
    if key is None or key == "generate" or re.fullmatch(r"file:.+|env:[A-Za-z_][A-Za-z0-9_]*", key):
        return
    yield ("auth", "key"), "must be generate, file:PATH or env:VARIABLE: a key itself does not belong in this file"


_RULES: tuple[Callable[[ServiceEntry], Iterator[Problem]], ...] = (
    _kind,
    _model,
    _app,
    _embed,
    _numbers,
    _texts,
    _gpus,
    _env,
    _auth,
)


# services beside each other


def _ports(services: Mapping[str, ServiceEntry], default_host: str) -> Iterator[Problem]:
    seen: list[tuple[str, str, int]] = []
    for name, entry in services.items():
        if entry.port is None:
            continue
        host = entry.host or default_host
        other = next((who for who, where, port in seen if port == entry.port and _overlap(where, host)), None)
        if other:
            yield ("services", name, "port"), f"{entry.port} is the port of {other} already"
        seen.append((name, host, entry.port))


def _overlap(one: str, other: str) -> bool:
    names = {"localhost": "127.0.0.1"}
    return names.get(one, one) == names.get(other, other) or one in _WILDCARDS or other in _WILDCARDS


def _devices(services: Mapping[str, ServiceEntry]) -> Iterator[Problem]:
    owners: dict[int, tuple[str, GpusEntry]] = {}
    for name, entry in services.items():
        for index in dict.fromkeys((entry.gpus and entry.gpus.ids) or ()):
            other = owners.get(index)
            if other and entry.gpus and not (entry.gpus.shared and other[1].shared):
                share = f"to share it on purpose: {{ids: [{index}], shared: true}} in both"
                yield ("services", name, "gpus"), f"GPU {index} is {other[0]}'s already; {share}"
            elif entry.gpus:
                owners[index] = (name, entry.gpus)


def _dependencies(services: Mapping[str, ServiceEntry], names: list[str]) -> Iterator[Problem]:
    for name, entry in services.items():
        for wanted in entry.depends_on or ():
            if wanted not in names:
                near = difflib.get_close_matches(wanted, names, n=1)
                hint = f", did you mean {near[0]}?" if near else ""
                yield ("services", name, "depends_on"), f"there is no service {wanted!r} in this file{hint}"
    try:
        order(services)
    except graphlib.CycleError as error:
        cycle = list(reversed(error.args[1]))
        yield ("services", cycle[0], "depends_on"), f"goes in a circle: {' → '.join(cycle)}"
