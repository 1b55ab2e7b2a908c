"""modelserve's two names: `api` for the class of a model, `runserver_with_args` for its start scripts.

    from mdeploy.compat.modelserve import JsonResponse, api, runserver_with_args

    @api(name="custom")
    class Model:
        def init(self, device): ...
        def inference(self, request): return JsonResponse({"text": …})

    if __name__ == "__main__":
        runserver_with_args()

Only import lines differ from what ran before. The class itself stays as it is; what our core runs is the handler
in its `__mdeploy_handler__`. Runs in workers: standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, ClassVar, TypeVar, overload

from mdeploy.compat import devices, djangohttp
from mdeploy.compat.adapter import Mark, go_home, handler_for
from mdeploy.compat.djangohttp import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBadRequest,
    HttpResponseForbidden,
    HttpResponseNotFound,
    HttpResponseServerError,
    JsonResponse,
)
from mdeploy.serving.handler import Handler, Request

__all__ = [
    "Http404",
    "HttpRequest",
    "HttpResponse",
    "HttpResponseBadRequest",
    "HttpResponseForbidden",
    "HttpResponseNotFound",
    "HttpResponseServerError",
    "JsonResponse",
    "api",
    "runserver_with_args",
]

DEVICE_VARIABLE = "MDEPLOY_MODELSERVE_DEVICE"
"""What `init` gets, word for word, in place of our own name of the device: `--device` of the start scripts."""

VISIBLE_VARIABLE = "MDEPLOY_MODELSERVE_VISIBLE"
"""CUDA_VISIBLE_DEVICES as it was when `--device` was given; empty where it was not set."""

registered_apis: dict[str, type] = {}
"""The classes of this process by their names in the URL."""

C = TypeVar("C", bound=type)


@overload
def api(name: str) -> Callable[[C], C]: ...
@overload
def api(name: C) -> C: ...
@overload
def api(name: None = None) -> Callable[[C], C]: ...
def api(name: Any = None) -> Any:
    """Serve a class with `init(device)` and `inference(request)` at `/<name>`; `@api` alone takes its name in lower
    case."""
    if isinstance(name, type):
        return _register(name, name.__name__.lower())
    return lambda cls: _register(cls, cls.__name__.lower() if name is None else name)


def _register(cls: C, name: str) -> C:
    path = "/" + name.strip("/")
    if not callable(getattr(cls, "inference", None)):
        raise TypeError(f"@api: {cls.__name__} has no method inference(self, request)")
    name = path.strip("/")
    handler = handler_for(cls, _ModelHandler, name=name.replace("/", "-"), path=path, max_batch_size=1)
    cls.__mdeploy_handler__ = Mark(lambda owner: handler if owner is cls else None)  # type: ignore[attr-defined]
    registered_apis[name] = cls
    return cls


class _ModelHandler(Handler):
    """A modelserve class as a handler: one request at a time, as its own worker ran it."""

    __wrapped__: ClassVar[type]
    methods = ("GET", "POST", "PUT", "PATCH", "DELETE")

    def init(self, device: str) -> None:
        _prepare_django(self.__wrapped__)
        if DEVICE_VARIABLE not in os.environ:  # a start script of its own has brought us where it stands
            go_home(self.__wrapped__)
        self.model = self.__wrapped__()
        if hasattr(self.model, "init"):
            self.model.init(_device(device))

    def inference(self, request: Request) -> Any:
        try:
            return djangohttp.answer(self.model.inference(djangohttp.HttpRequest(request)))
        except Exception as error:
            refusal = djangohttp.refusal(error)
            if refusal is None:
                raise
            raise refusal from error

    def close(self) -> None:
        closes = getattr(getattr(self, "model", None), "close", None)
        if callable(closes):
            closes()


def _device(ours: str) -> str:
    asked = os.environ.get(DEVICE_VARIABLE)
    visible = os.environ.get(VISIBLE_VARIABLE)
    if asked is None:
        return devices.own(ours)
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    elif visible == "":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return asked


def _prepare_django(cls: type) -> None:
    """Django's responses ask for settings. Raises RuntimeError where a class imports Django and there is none."""
    if importlib.util.find_spec("django") is None:
        method = next((name for name in vars(cls) if _imports_django(vars(cls)[name])), None)
        if method:
            hint = "from mdeploy.compat.modelserve import JsonResponse, HttpResponse"
            raise RuntimeError(f"{cls.__name__}.{method} imports django, which is not installed here. Use {hint}")
        return
    from django.conf import settings  # type: ignore[import-not-found, unused-ignore]

    if not settings.configured:
        settings.configure(DEFAULT_CHARSET="utf-8", USE_TZ=True)


def _imports_django(member: Any) -> bool:
    code = getattr(member, "__code__", None)
    return isinstance(code, CodeType) and any(name.split(".")[0] == "django" for name in _names(code))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def runserver_with_args() -> None:
    """The command line of a modelserve script: `--controller --port P`, or `--worker --port P --name N …`."""
    if "mdeploy.serving.load" in sys.modules:
        return  # a worker reads the script, which calls us without asking for __main__
    from mdeploy.compat import commandline

    commandline.main(registered_apis)
