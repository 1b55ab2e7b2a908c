"""What a user named as a model: ids, directories, recipes, and the three together as a file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UsageError
from mdeploy.paths import Paths
from mdeploy.resolve import Model, Wanted, name_of, understand
from tests.support import tiny_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A project with a model, and recipes of its own; the tests stand somewhere else."""
    root = tmp_path / "project"
    tiny_model(root / "models" / "tiny")
    recipe = root / "recipes" / "a" / "b.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("kind: llm\nmodel: a/b\nrevision: v2\nargs: [--max-num-seqs, '8']\n")
    return root


def _model(base: Path, model: str = "", **more: Any) -> Model:
    return understand(Paths(base / "home"), Wanted(model, base=base, **more))


@pytest.mark.parametrize(
    ("words", "ref"),
    [
        ({"model": "q/w"}, "q/w"),
        ({"model": "q/w@v1"}, "q/w@v1"),
        ({"model": "q/w", "revision": "v3"}, "q/w@v3"),
        ({"model": "a/b"}, "a/b@v2"),
        ({"model": "B"}, "a/b@v2"),
        ({"model": "a/b@v1"}, "a/b@v1"),
        ({"model": "recipes/a/b.yaml"}, "a/b@v2"),
        ({"recipe": "b"}, "a/b@v2"),
        ({"recipe": "recipes/a/b.yaml", "revision": "v9"}, "a/b@v9"),
        ({"recipe": "b", "model": "c/d"}, "c/d"),
        ({"model": "https://modelscope.cn/models/q/w"}, "q/w"),
    ],
)
def test_ids_and_recipes(base: Path, words: dict[str, str], ref: str) -> None:
    assert str(_model(base, **words).ref) == ref


def test_a_recipe_beside_a_model_counts(base: Path) -> None:
    for words in ({"recipe": "b", "model": "c/d"}, {"recipe": "b", "model": "./models/tiny"}, {"model": "a/b"}):
        recipe = _model(base, **words).recipe
        assert recipe is not None
        assert recipe.args == ("--max-num-seqs", "8")


def test_directories_start_at_the_base(base: Path) -> None:
    for words in ({"model": "./models/tiny"}, {"model": "models/tiny"}, {"source": "models/tiny"}):
        model = _model(base, **words)
        assert (model.ref, model.directory, model.title) == (None, base / "models/tiny", "tiny")


def test_a_directory_can_have_the_name_of_a_hub_id(base: Path) -> None:
    model = _model(base, "models/tiny", source="./models/tiny")
    assert (str(model.ref), model.directory, model.title) == ("models/tiny", base / "models/tiny", "models/tiny")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"model": "bare"}, UsageError),
        ({"model": "./none"}, NotFoundError),
        ({"source": "none"}, NotFoundError),
        ({"model": "a/b", "source": "none"}, NotFoundError),
        ({"recipe": "nobody"}, NotFoundError),
        ({"recipe": "no.yaml"}, NotFoundError),
        ({"model": "~nosuchuser/x"}, ConfigError),
    ],
)
def test_what_is_not_there(base: Path, words: dict[str, str], error: type[MdeployError]) -> None:
    with pytest.raises(error):
        _model(base, **words)


def test_names_of_services() -> None:
    assert name_of("Qwen/Qwen3-0.6B") == "qwen3-0.6b"
    assert name_of("汉字") == "llm"
