"""easy-serve's handles and its YAML: POST /predict with JSON, the handle gets {'task_id': …, 'task_info': JSON}.

    from mdeploy.compat.easyserve import BaseHandle, registry

    @registry.reg()
    class ImagenetResnet18Handle(BaseHandle):
        def __init__(self, gpu): ...
        def preprocess(self, data): ...
        def forward(self, data): ...
        def postprocess(self, data): ...

A class that is no BaseHandle of ours does as well where it is named (`handle.py:Class`, or by the YAML). `forward`
gets one task, as it always did; a class with `max_batch_size` above 1 gets a list of them.
Runs in workers: standard library only (the YAML is read by the command line).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mdeploy.compat import devices
from mdeploy.compat.adapter import Mark, go_home, handler_for
from mdeploy.serving.handler import Handler, HTTPError, Request

DEFAULT_PORT = 9876

_STEPS = ("preprocess", "forward", "postprocess")
C = TypeVar("C", bound=type)
_counter = itertools.count()


@functools.cache
def adapted(cls: type) -> type[Handler] | None:
    """A handle's class as a handler; None for a class that is no whole handle."""
    has_steps = all(callable(getattr(cls, step, None)) for step in _STEPS)
    has_call = any("__call__" in vars(kind) for kind in cls.__mro__)
    if issubclass(cls, Handler) or inspect.isabstract(cls) or not (has_steps or has_call) or cls is BaseHandle:
        return None
    is_batched = has_steps and getattr(cls, "max_batch_size", 1) != 1
    return handler_for(cls, _BatchedHandler if is_batched else _TaskHandler)


class BaseHandle:
    """Base of a handle: `__init__(gpu)`, then `preprocess`, `forward` and `postprocess` for each task."""

    __mdeploy_handler__ = Mark(adapted)

    def __init__(self, gpu: str) -> None:
        """Load the model; `gpu` is the number of the GPU as text."""

    def preprocess(self, data: Any) -> Any:
        """The task as the model takes it."""
        return data

    def forward(self, data: Any) -> Any:
        """Ask the model."""
        raise NotImplementedError

    def postprocess(self, data: Any) -> Any:
        """What is sent as JSON."""
        return data

    def __call__(self, data: Any) -> Any:
        """One task from beginning to end."""
        return self.postprocess(self.forward(self.preprocess(data)))


Handle = BaseHandle


class ClassRegistry:
    """Where handles register by `@registry.reg()`."""

    def __init__(self) -> None:
        self.class_dict: dict[str, type] = {}

    def reg(self) -> Callable[[C], C]:
        """Register a class under its name, and mark it as one that can be served."""

        def decorator(cls: C) -> C:
            self.class_dict[cls.__name__] = cls
            if not hasattr(cls, "__mdeploy_handler__"):
                cls.__mdeploy_handler__ = Mark(adapted)  # type: ignore[attr-defined]
            return cls

        return decorator


registry = ClassRegistry()


class _Predicting(Handler):
    """What both ways to run a handle have in common."""

    __wrapped__: ClassVar[type]
    path = "/predict"
    methods = ("POST",)

    def init(self, device: str) -> None:
        go_home(self.__wrapped__)
        self.handle = self.__wrapped__(devices.own("0"))

    def task(self, request: Request) -> dict[str, Any]:
        """The task of a request, as easy-serve's scheduler made it. Raises HTTPError 400 for what is no JSON."""
        return {"task_id": f"{time.time_ns() // 100}{next(_counter):04d}", "task_info": request.json()}


class _TaskHandler(_Predicting):
    """One task at a time through the handle, by its own `__call__` where it has one."""

    def inference(self, request: Request) -> Any:
        data = self.task(request)
        if callable(self.handle):
            return _told(self.handle(data))
        return _told(self.handle.postprocess(self.handle.forward(self.handle.preprocess(data))))


class _BatchedHandler(_Predicting):
    """`forward` gets a list of what `preprocess` made, and gives as many outputs."""

    def preprocess(self, request: Request) -> Any:
        return self.handle.preprocess(self.task(request))

    def forward(self, batch: list[Any]) -> Any:
        return self.handle.forward(batch)

    def postprocess(self, output: Any) -> Any:
        return _told(self.handle.postprocess(output))


def _told(result: Any) -> Any:
    """Raises HTTPError for the mistake a fresh handle begins with: methods that return nothing."""
    if result is None:
        raise HTTPError(500, "the handle returned nothing: postprocess must return what is sent", code="no_result")
    return result


# the YAML


@dataclass(frozen=True, slots=True)
class Config:
    """An easy-serve YAML in our terms. `gpus` empty means CPU; `ignored` are keys that mean nothing to us."""

    handlers: tuple[str, ...]
    paths: tuple[str, ...]
    gpus: tuple[str, ...]
    workers_per_gpu: int
    port: int = DEFAULT_PORT
    ignored: tuple[str, ...] = ()


def read_config(path: str | Path) -> Config:
    """Read `GPUs`, `ProcessPerGPU`, `Handle` and, if it is there, `Port`.

    `Handle` is a class in handle.py (beside the YAML, in its parent, in src/ of either, or where we are), or
    names its file: `module.Class`, `FILE.py:Class`. Raises ConfigError and NotFoundError.
    """
    file = Path(path).expanduser().absolute()
    values = _yaml(file)
    keys = {key.lower(): value for key, value in values.items()}
    handle_file, name = _locate(file, _handle(file, keys))
    return Config(
        handlers=(f"{handle_file}:{name}",),
        paths=(str(handle_file.parent),),
        gpus=_gpus(file, keys.get("gpus")),
        workers_per_gpu=_whole(file, "ProcessPerGPU", keys.get("processpergpu", 1), 1, 256),
        port=_whole(file, "Port", keys.get("port", DEFAULT_PORT), 1, 65535),
        ignored=tuple(key for key in values if key.lower() not in ("gpus", "processpergpu", "handle", "port")),
    )


def _yaml(file: Path) -> Mapping[str, Any]:
    import yaml

    from mdeploy.errors import NotFoundError

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {file}", hint="mdeploy serve app -c configs/NAME.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _wrong(file, f"it cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise _wrong(file, "it has no keys")
    return values


def _wrong(file: Path, why: str) -> Exception:
    from mdeploy.errors import ConfigError

    return ConfigError(f"{file}: {why}", hint='GPUs: "0,1" / ProcessPerGPU: 2 / Handle: ClassName, one a line')


def _handle(file: Path, keys: Mapping[str, Any]) -> str:
    handle = keys.get("handle")
    if not isinstance(handle, str) or not handle.strip():
        raise _wrong(file, "Handle must name a class")
    return handle.strip()


def _gpus(file: Path, value: Any) -> tuple[str, ...]:
    words = [str(item) for item in value] if isinstance(value, list) else str("" if value is None else value).split(",")
    found = tuple(word.strip() for word in words if word.strip())
    if [word.lower() for word in found] in (["cpu"], ["none"]):
        return ()
    if not all(word.isdecimal() for word in found) or len(set(found)) != len(found):
        raise _wrong(file, f'GPUs: {value!r} must be numbers like "0,1", each once')
    return found


def _whole(file: Path, key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(file, f"{key}: {value!r} must be a whole number from {low} to {high}")
    return value


def _locate(config: Path, handle: str) -> tuple[Path, str]:
    """File and class that `Handle` means. Raises NotFoundError."""
    from mdeploy.errors import NotFoundError

    where, _, name = handle.rpartition(":" if ":" in handle else ".")
    module = where if where.endswith(".py") else f"{where.replace('.', '/') or 'handle'}.py"
    roots = (config.parent, config.parent.parent, Path.cwd())
    places = list(dict.fromkeys(root / sub / module for root in roots for sub in ("", "src")))
    found = next((place.resolve() for place in places if place.is_file() and _has_class(place, name)), None)
    if found is None:
        tried = ", ".join(str(place) for place in places)
        raise NotFoundError(f"{config}: no class {name} in {tried}", hint="Handle: /path/of/handle.py:ClassName")
    return found, name


def _has_class(file: Path, name: str) -> bool:
    """Whether a file defines a class, without running it; its own mistakes are told when it is served."""
    import ast

    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return True
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)
