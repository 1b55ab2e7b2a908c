"""From `FILE.py:Class`, `FILE.py` or `package.mod:Class` to handler classes, and what they say of themselves.

Runs in the worker, in the user's interpreter: importing a user's module is importing all it stands on.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mdeploy.serving.handler import STREAMED_AS, Handler, Request
from mdeploy.serving.info import BOUNDS, WHOLE, HandlerInfo

OWN_PATHS = ("/", "/health", "/ready", "/metrics", "/docs", "/redoc", "/openapi.json")
"""What the edge answers itself."""

_OVERRIDES = (*BOUNDS, "max_batch_cost", "name", "path")


class LoadError(Exception):
    """A handler cannot be used as it stands; the text says why, in a sentence."""


def handlers(spec: str, paths: Sequence[str] = ()) -> tuple[type[Handler], ...]:
    """The classes a spec names; all of a module where it names none.

    `paths` go before sys.path. Raises LoadError, and whatever the module raises while it is imported.
    """
    where, _, name = spec.partition(":")
    sys.path[:0] = [path for path in paths if path not in sys.path]
    module = _from_file(Path(where)) if is_file(where) else importlib.import_module(where)
    if name:
        return (_adapted(_member(module, name), spec),)
    found = [_adapted(value, spec) for value in vars(module).values() if _is_own(value, module)]
    if not found:
        raise LoadError(f"{where} defines no Handler with inference or forward")
    return tuple(dict.fromkeys(found))


def is_file(where: str) -> bool:
    """Whether the first part of a spec is a path, and no module's name."""
    return where.endswith(".py") or "/" in where


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise LoadError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # a file that is called like something imported already must not take its place
    name = path.stem if path.stem not in sys.modules else f"_app_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _member(module: ModuleType, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise LoadError(f"{module.__file__} has no {name}")
        value = getattr(value, part)
    return value


def _is_own(value: Any, module: ModuleType) -> bool:
    if not inspect.isclass(value) or value.__module__ != module.__name__:
        return False
    return hasattr(value, "__mdeploy_handler__") or (issubclass(value, Handler) and _is_whole(value))


def _is_whole(cls: type[Handler]) -> bool:
    return cls.inference is not Handler.inference or cls.forward is not Handler.forward


def _adapted(value: Any, spec: str) -> type[Handler]:
    """The handler a value is, or that stands for it (`__mdeploy_handler__`: the compat decorators leave it)."""
    value = getattr(value, "__mdeploy_handler__", value)
    if inspect.isclass(value) and not issubclass(value, Handler):
        # a layer above us, so it is found by its name: users of easy-serve wrote classes without any base of ours
        value = importlib.import_module("mdeploy.compat.easyserve").adapted(value) or value
    if not inspect.isclass(value) or not issubclass(value, Handler):
        raise LoadError(f"{spec} is no Handler: write `class {getattr(value, '__name__', 'X')}(mdeploy.Handler)`")
    return value


# what a class says of itself


def describe(
    cls: type[Handler],
    overrides: Mapping[str, Any] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> HandlerInfo:
    """A class with `overrides` applied and checked; `config` has further ones for each handler, by its name.

    Raises LoadError.
    """
    if not _is_whole(cls):
        raise LoadError(f"{cls.__name__} has neither inference nor forward")
    if inspect.iscoroutinefunction(cls.inference) or inspect.iscoroutinefunction(cls.forward):
        raise LoadError(f"{cls.__name__}: async methods are not run concurrently: write plain ones, and more workers")
    own = (config or {}).get(cls.name or cls.__name__.lower(), (config or {}).get(cls.__name__, {}))
    values = {name: getattr(cls, name) for name in _OVERRIDES} | dict(overrides or {}) | dict(own)
    unknown = sorted(values.keys() - set(_OVERRIDES))
    if unknown:
        raise LoadError(f"{cls.__name__}: unknown option {', '.join(unknown)}")
    name = values["name"] or cls.__name__.lower()
    batched = cls.inference is Handler.inference
    numbers = {key: _number(cls, key, values[key]) for key in BOUNDS}
    return HandlerInfo(
        name=name,
        path=_path(cls, values["path"] or f"/{name}"),
        aliases=() if values["path"] or name == cls.__name__ else (f"/{cls.__name__}",),
        methods=_methods(cls),
        max_batch_cost=_cost(cls, values["max_batch_cost"]),
        example=_example(cls),
        body=_schema(cls, "body"),
        result=_schema(cls, "result"),
        responses=_responses(cls),
        streamed_as=_streamed_as(cls),
        streams=inspect.isgeneratorfunction(cls.forward if batched else cls.inference),
        doc=inspect.getdoc(cls) or "" if cls.__doc__ else "",
        source=_source(cls),
        **(numbers if batched else {**numbers, "max_batch_size": 1}),
    )


def _number(cls: type[Handler], key: str, value: Any) -> Any:
    low, high = BOUNDS[key]
    kinds = (int,) if key in WHOLE else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if key in WHOLE else "a number"
        raise LoadError(f"{cls.__name__}.{key} = {value!r}: {kind} from {low} to {high}")
    return value


def _cost(cls: type[Handler], value: Any) -> float | None:
    if value is not None and (not isinstance(value, (int, float)) or not value > 0):
        raise LoadError(f"{cls.__name__}.max_batch_cost = {value!r}: a number above 0, or None")
    return value


def _path(cls: type[Handler], path: Any) -> str:
    if not isinstance(path, str) or not path.startswith("/") or any(c in path for c in "{}?# "):
        raise LoadError(f"{cls.__name__}.path = {path!r}: a plain path like /{cls.__name__.lower()}")
    if path in OWN_PATHS:
        raise LoadError(f"{cls.__name__}.path = {path!r} is the service's own; take another")
    return path


def _methods(cls: type[Handler]) -> tuple[str, ...]:
    """A class that declares its body and says nothing of methods takes POST only: a GET has no body."""
    if cls.methods is Handler.methods and cls.body is not None:
        return ("POST",)
    wrong = [method for method in cls.methods if method not in ("GET", "POST", "PUT", "PATCH", "DELETE")]
    if wrong or isinstance(cls.methods, str) or not cls.methods:
        raise LoadError(f"{cls.__name__}.methods = {cls.methods!r}: a list of GET, POST, PUT, PATCH, DELETE")
    return tuple(cls.methods)


def _responses(cls: type[Handler]) -> dict[int, str]:
    wrong = [status for status in cls.errors.values() if not isinstance(status, int) or not 400 <= status <= 599]
    if wrong:
        raise LoadError(f"{cls.__name__}.errors has the status {wrong[0]!r}: 400 to 599")
    return {int(status): str(text) for status, text in cls.responses.items()} | {
        status: error.__name__ for error, status in cls.errors.items() if status not in cls.responses
    }


def _streamed_as(cls: type[Handler]) -> Any:
    if cls.streamed_as not in STREAMED_AS:
        raise LoadError(f"{cls.__name__}.streamed_as = {cls.streamed_as!r}: {' or '.join(STREAMED_AS)}")
    return cls.streamed_as


def _example(cls: type[Handler]) -> Request | None:
    """The example as a request; what is neither a Request nor bytes is sent as JSON."""
    example = cls.example
    if example is None or isinstance(example, Request):
        return example
    is_raw = isinstance(example, (bytes, bytearray))
    try:
        body = bytes(example) if is_raw else json.dumps(example).encode()
    except (TypeError, ValueError) as error:
        raise LoadError(f"{cls.__name__}.example is no JSON: {error}") from error
    kind = b"application/octet-stream" if is_raw else b"application/json"
    return Request(headers=((b"content-type", kind),), body=body, id="example")


def _schema(cls: type[Handler], which: str) -> dict[str, Any] | None:
    """JSON Schema of a declared body or result: as it is given, or as pydantic derives it."""
    declared = getattr(cls, which)
    if declared is None or isinstance(declared, dict):
        return declared
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise LoadError(f"{cls.__name__}.{which} is a type: that needs pydantic in {sys.executable}") from error
    mode: Any = "validation" if which == "body" else "serialization"
    return dict(TypeAdapter(declared).json_schema(mode=mode, ref_template="#/$defs/{model}"))


def _source(cls: type[Handler]) -> str:
    try:
        return str(Path(inspect.getfile(getattr(cls, "__wrapped__", cls))).resolve())
    except (TypeError, OSError):
        return ""


def measured(info: HandlerInfo, handler: Handler) -> HandlerInfo:
    """The same with what `init` found out; a limit that somebody has set from outside stays. Raises LoadError."""
    cost = info.max_batch_cost
    if "max_batch_cost" in vars(handler) and cost == type(handler).max_batch_cost:
        cost = _cost(type(handler), handler.max_batch_cost)
    return dataclasses.replace(info, max_batch_cost=cost, facts=dict(handler.facts))


def with_service(info: HandlerInfo, service: str) -> HandlerInfo:
    """The only handler of a service answers under the service's name too."""
    alias = f"/{service}"
    if alias in (info.path, *info.aliases, *OWN_PATHS):
        return info
    return dataclasses.replace(info, aliases=(*info.aliases, alias))
