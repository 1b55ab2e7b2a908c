"""Services of kind app in a file: what is understood, what is refused, and what restarts them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from mdeploy import settings
from mdeploy.errors import ConfigError
from mdeploy.fleet import file
from mdeploy.prepare_app import AppRequest
from tests.support import mdeploy, ps

APP = """\
from mdeploy import Handler


class Echo(Handler):
    example = {"n": 1}

    def inference(self, request):
        return request.json()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/app.py").write_text(APP)
    return tmp_path / "mdeploy.yaml"


def _write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def _mistakes(path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        file.load(settings.load(), _write(path, text))
    return [line.partition(": ")[2] for line in error.value.message.splitlines()]


def test_an_app_means_what_it_says(path: Path) -> None:
    text = """\
        version: 1
        defaults: {tp: 2, engine: vllm-cpu, batch: 4, env: {A: x}}
        services:
          cats:
            kind: app
            handler: cats/app.py:Echo
            model: ./weights
            path: lib
            gpus: none
            workers_per_gpu: 2
            timeout: 2m
            max_body: 2MiB
            config: {echo: {queue: 3}}
          dogs: {kind: app, handler: [cats/app.py, pkg.mod:Dog], gpus: {count: 2}, depends_on: cats}
          chat: {model: a/b}
        """
    fleet = file.load(settings.load(), _write(path, text))
    asked = {s.name: file.request(s, fleet.path) for s in fleet.services}
    cats, dogs = asked["cats"], asked["dogs"]
    assert isinstance(cats, AppRequest)
    assert isinstance(dogs, AppRequest)
    assert (cats.wish.handlers, cats.wish.paths, cats.wish.gpus) == (("cats/app.py:Echo",), ("lib",), "none")
    assert (cats.wish.batch, cats.wish.timeout, cats.wish.max_body) == (4, 120.0, 2 << 20)
    assert (cats.wish.config, cats.terms.base) == ({"echo": {"queue": 3}}, path.parent)
    assert cats.model is not None
    assert (cats.model.model, cats.terms.env) == ("./weights", {"A": "x"})
    assert (dogs.wish.handlers, dogs.wish.gpu_count) == (("cats/app.py", "pkg.mod:Dog"), 2)
    assert dogs.model is None


def test_mistakes(path: Path) -> None:
    text = """\
        version: 1
        services:
          a: {kind: app}
          b: {kind: app, handler: x.py, tp: 2, batch: 0, config: {echo: {bacth: 1}}}
          c: {kind: app, handler: x.py, timeout: soon, gpus: most}
          d: {model: a/b, handler: x.py, gpus: none}
        """
    assert sorted(_mistakes(path, text)) == [
        "services.a.handler: is missing: FILE.py:Class, or a recipe",
        "services.b.batch: must be from 1 to 100000, not 0",
        "services.b.config.echo.bacth: is no option of a handler: did you mean batch?",
        "services.b.tp: belongs to services of kind llm, embed, gme",
        "services.c.gpus: must be \"0,1\", [0, 1], {ids: [0, 1]}, {count: 2}, all or none, not 'most'",
        "services.c.timeout: must be seconds, or a duration like 90s or 10m, not 'soon'",
        "services.d.gpus: none is for services of another kind than llm: name ids, or a count",
        "services.d.handler: belongs to services of kind app",
    ]


def test_up_restarts_what_changed_and_rollback_goes_back(path: Path) -> None:
    text = "version: 1\nservices: {cats: {kind: app, handler: cats/app.py:Echo}}\n"
    _write(path, text)
    first = mdeploy("up")
    assert (first.code, "created" in first.stdout) == (0, True), first.stderr
    assert mdeploy("diff").stdout == "cats: unchanged (ready)\n"
    (path.parent / "cats/app.py").write_text(f"{APP}\n# another one\n")
    changed = mdeploy("diff")
    assert (changed.code, "handler.app.py:Echo" in changed.stdout) == (1, True)
    _write(path, text.replace("Echo}", "Echo, workers_per_gpu: 2}"))
    second = mdeploy("up")
    assert (second.code, "restarted" in second.stdout) == (0, True), second.stderr
    back = mdeploy("rollback", "cats")
    assert back.code == 0, back.stderr
    assert (ps("cats") or {})["phase"] == "ready"
    assert mdeploy("down").code == 0
