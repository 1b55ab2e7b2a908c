"""From a spec to classes and what they say of themselves; what is wrong with a class is said in a sentence."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mdeploy.serving import load
from mdeploy.serving.handler import Handler

TWO = """
import helper_beside
from mdeploy import Handler
class First(Handler):
    "Says one."
    def inference(self, request): return helper_beside.ONE
class Base(Handler):
    pass
class Second(Base):
    def forward(self, batch): return batch
"""


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    modules, path = dict(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside.py").write_text("ONE = 1\n")
    path = tmp_path / "app.py"
    path.write_text(TWO)
    return path


def made(**attributes: Any) -> type[Handler]:
    own = {"inference": lambda self, request: None, **attributes}
    return types.new_class("Made", (Handler,), exec_body=lambda namespace: namespace.update(own))


def test_a_file_finds_what_lies_beside_it(app: Path) -> None:
    assert [cls.__name__ for cls in load.handlers(f"{app}:First")] == ["First"]


def test_a_whole_file_gives_every_class_that_can_work(app: Path) -> None:
    assert [cls.__name__ for cls in load.handlers(str(app))] == ["First", "Second"]


def test_a_module_is_found_on_the_given_path(app: Path) -> None:
    assert [cls.__name__ for cls in load.handlers("app:Second", [str(app.parent)])] == ["Second"]


def test_a_file_called_like_a_module_in_use_does_not_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text("from mdeploy import Handler\nclass A(Handler):\n    def inference(self, request): return 1\n")
    (cls,) = load.handlers(str(path))
    assert cls.__module__ == "_app_json"
    assert hasattr(sys.modules["json"], "dumps")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("/nowhere/app.py:A", "there is no file /nowhere/app.py"),
        ("{app}:Third", "has no Third"),
        ("{app}:helper_beside", "is no Handler"),
        ("{empty}", "defines no Handler with inference or forward"),
    ],
)
def test_a_spec_that_leads_nowhere(app: Path, spec: str, text: str) -> None:
    empty = app.with_name("empty.py")
    empty.write_text("")
    with pytest.raises(load.LoadError, match=text):
        load.handlers(spec.format(app=app, empty=empty))


def test_what_a_class_says_of_itself(app: Path) -> None:
    (cls,) = load.handlers(f"{app}:First")
    info = load.describe(cls)
    assert (info.name, info.path, info.aliases) == ("first", "/first", ("/First",))
    assert (info.doc, info.source, info.methods) == ("Says one.", str(app), ("GET", "POST"))
    assert load.with_service(info, "svc").aliases == ("/First", "/svc")
    assert load.with_service(info, "health") is info


def test_recipe_and_command_line_win_over_the_class() -> None:
    cls = made(inference=Handler.inference, forward=lambda self, batch: batch, max_batch_size=4, timeout=3)
    info = load.describe(cls, {"max_batch_size": 8}, {"made": {"timeout": 9, "path": "/x"}})
    assert (info.max_batch_size, info.timeout, info.path, info.aliases) == (8, 9, "/x", ())


def test_inference_is_never_batched() -> None:
    assert load.describe(made(max_batch_size=16)).max_batch_size == 1


def test_a_declared_body_means_post() -> None:
    schema = {"type": "object"}
    info = load.describe(made(body=schema))
    assert (info.methods, info.body) == (("POST",), schema)
    assert load.describe(made(body=list[int])).body == {"items": {"type": "integer"}, "type": "array"}


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"inference": Handler.inference}, "neither inference nor forward"),
        ({"max_batch_size": 0}, "max_batch_size = 0"),
        ({"max_batch_size": 2.5}, "a whole number"),
        ({"timeout": "10"}, "timeout = '10'"),
        ({"timeout": float("nan")}, "timeout = nan"),
        ({"max_batch_cost": -1}, "max_batch_cost"),
        ({"path": "no-slash"}, "a plain path"),
        ({"path": "/metrics"}, "the service's own"),
        ({"methods": "POST"}, "a list of"),
        ({"methods": ["BREW"]}, "a list of"),
        ({"example": object()}, "no JSON"),
        ({"streamed_as": "grpc"}, "sse or raw"),
        ({"errors": {KeyError: 200}}, "400 to 599"),
    ],
)
def test_a_class_that_cannot_be(attributes: dict[str, Any], text: str) -> None:
    with pytest.raises(load.LoadError, match=text):
        load.describe(made(**attributes))


def test_async_methods_are_refused_with_the_way_out() -> None:
    async def inference(self: Any, request: Any) -> None:
        return None

    with pytest.raises(load.LoadError, match="more workers"):
        load.describe(made(inference=inference))


def test_an_unknown_override_is_told() -> None:
    with pytest.raises(load.LoadError, match="unknown option batchsize"):
        load.describe(made(), {}, {"made": {"batchsize": 3}})
