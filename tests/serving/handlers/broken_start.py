"""Classes that cannot start, each in its own way."""
# ruff: noqa: RUF012 as users write it

from __future__ import annotations

import os
import time
from typing import Any

from lab import note  # type: ignore[import-not-found]

from mdeploy.serving.handler import Handler, Request


class InInit(Handler):
    def init(self, device: str) -> None:
        note("init", os.getpid())
        raise RuntimeError("the weights are not here")

    def inference(self, request: Request) -> Any:
        return None


class InExample(Handler):
    example = {"n": 1}

    def inference(self, request: Request) -> Any:
        raise KeyError("not there")


class Neither(Handler):
    pass


class Killed(Handler):
    def init(self, device: str) -> None:
        note("init", os.getpid())
        os.kill(os.getpid(), 9)

    def inference(self, request: Request) -> Any:
        return None


class Endless(Handler):
    def init(self, device: str) -> None:
        time.sleep(3600)

    def inference(self, request: Request) -> Any:
        return None
