"""`mdeploy init`: the first files of something of one's own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mdeploy.cli import output
from mdeploy.errors import ConfigError, UsageError

_TAKEN = ("Any", "False", "Handler", "HTTPError", "None", "Request", "True")

_APP = '''\
"""{title}: served by `mdeploy serve app recipe.yaml`, in this directory."""

from typing import Any

from mdeploy import Handler, HTTPError, Request


class {cls}(Handler):
    """Counts words: put your model in the place of that. This text stands on the page /docs."""

    max_batch_size = 32  # items that forward gets at once, at most; under load batches fill by themselves
    timeout = 30  # seconds until a request is answered 504, its time in the queue included
    example = {{"text": "hello world"}}  # asked at the start, and when the service is asked whether it is ready

    def init(self, device: str) -> None:
        """Load the model, once in each worker. device is cuda:0 (each worker sees only its own GPU) or cpu."""
        # self.model = load(self.model_dir).to(device)  # model_dir: see `model` in recipe.yaml
        self.device = device

    def preprocess(self, request: Request) -> str:
        """One request to one item of a batch. What is wrong with it is told here, and only to its client."""
        body = request.json()
        text = body.get("text") if isinstance(body, dict) else None
        if not isinstance(text, str):
            raise HTTPError(422, 'send JSON like {{"text": "hello world"}}')
        return text

    def forward(self, batch: list[str]) -> list[int]:
        """As many outputs as items, in the same order: this is where the GPU works."""
        return [len(text.split()) for text in batch]

    def postprocess(self, output: int) -> dict[str, Any]:
        """One output to one answer, sent as JSON."""
        return {{"words": output}}
'''

_TEST = '''\
"""The class without a server: `python -m pytest`, in this directory."""

import json

import pytest
from app import {cls}

from mdeploy import HTTPError, Request


@pytest.fixture(scope="module")
def handler() -> {cls}:
    made = {cls}()
    made.init("cpu")
    return made


def ask(handler: {cls}, *bodies: object) -> list[object]:
    """What a worker does with a batch of requests."""
    items = [handler.preprocess(Request(body=json.dumps(body).encode())) for body in bodies]
    return [handler.postprocess(output) for output in handler.forward(items)]


def test_the_example(handler: {cls}) -> None:
    assert ask(handler, handler.example) == [{{"words": 2}}]


def test_a_batch(handler: {cls}) -> None:
    assert ask(handler, {{"text": "one"}}, {{"text": "one two three"}}) == [{{"words": 1}}, {{"words": 3}}]


def test_wrong_input(handler: {cls}) -> None:
    with pytest.raises(HTTPError) as error:
        ask(handler, {{"txet": "one"}})
    assert error.value.status == 422
'''

_RECIPE = """\
# How it is served; options of the command line win: mdeploy serve app recipe.yaml --batch 64
kind: app
handler: app.py:{cls}
description: {title!r}
# model: owner/name          # downloaded if missing; the handler finds it in self.model_dir
# gpus: "0,1"                # or all, or none; without it the freest one, and the CPU where there is no GPU
# workers_per_gpu: 2         # processes on each GPU, or on the CPU
# python: /path/to/env/bin/python   # the environment of the model; it needs no mdeploy
# env: {{TOKENIZERS_PARALLELISM: "false"}}
"""


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Write the first files of something of your own.", rich_markup_mode=None)
    group.callback(no_args_is_help=True)(_group)
    group.command("app")(init_app)
    app.add_typer(group, name="init")


def _group() -> None:
    """A group also while it has one command."""


def init_app(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Directory to write, and the app's name.")],
) -> None:
    """Write a handler that works at once, its test and its recipe.

    They are NAME/app.py, NAME/test_app.py and NAME/recipe.yaml. Nothing is overwritten.
    """
    from mdeploy.paths import expand
    from mdeploy.supervise import state

    directory = expand(name)
    state.check_name(directory.name)
    words = {"title": directory.name, "cls": _class_name(directory.name)}
    files = {"app.py": _APP, "test_app.py": _TEST, "recipe.yaml": _RECIPE}
    _write(directory, {file: text.format(**words) for file, text in files.items()})
    where = shlex.quote(name)
    output.say(f"next: python -m pytest {where}   (the class without a server)")
    output.say(f"      mdeploy serve app {where}/recipe.yaml -d, or --reload while you write")
    output.emit({}, as_json=False, human=lambda: str(directory))


def _class_name(name: str) -> str:
    """my-model.v2 → MyModelV2; a name without letters at its beginning gets some."""
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", name) if part]
    made = "".join(part[:1].upper() + part[1:] for part in parts)
    return made if made[:1].isalpha() and made not in _TAKEN else f"Model{made}"


def _write(directory: Path, files: dict[str, str]) -> None:
    present = [name for name in files if (directory / name).exists()]
    if present:
        raise UsageError(
            f"{directory} has {', '.join(present)} already", hint="take another NAME: nothing is overwritten"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (directory / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or directory}: {error.strerror}") from error
