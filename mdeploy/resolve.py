"""What a user named as a model, understood: a hub id, a directory or a recipe, and what clients call it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from mdeploy import recipes
from mdeploy.errors import NotFoundError, UsageError
from mdeploy.hub import refs, store
from mdeploy.paths import Paths, expand
from mdeploy.specs import ModelRecipe, ModelRef


@dataclass(frozen=True, slots=True)
class Wanted:
    """The words of a user about a model.

    `model` is a hub id, a directory, a recipe (.yaml) or a recipe's name; `recipe` and `source` (a
    directory with the weights) stand beside it in a file of services. `base` is where relative
    paths start. `kinds` are the recipes that count. `root` is a directory that holds models as plain
    directories OWNER/NAME, in place of the cache.
    """

    model: str
    revision: str | None = None
    recipe: str | None = None
    source: str | None = None
    base: Path | None = None
    kinds: tuple[str, ...] = recipes.LLM
    root: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model argument, understood: where it is or would be, and what clients call it.

    `local_dir` is where it shall be downloaded to, None for the cache.
    """

    source: str
    ref: ModelRef | None
    directory: Path | None
    recipe: ModelRecipe | None
    local_dir: Path | None = None

    @property
    def title(self) -> str:
        """What clients may call it: the hub id, else the directory's name."""
        return self.ref.id if self.ref else (self.directory or Path(self.source)).name


def understand(paths: Paths, wanted: Wanted) -> Model:
    """What `wanted` means on this machine, nothing fetched.

    Raises UsageError for what is no model, NotFoundError for a directory or recipe that is not there.
    """
    where = recipes.directories(paths, wanted.base or Path.cwd())
    own = _recipe(wanted.recipe, wanted, where) if wanted.recipe else None
    text = wanted.model or (own.model if own else "")
    if wanted.source is None:
        return _understand(wanted, text, where, own)
    weights = _directory(wanted.source, wanted.base)
    if not text:
        return _in_directory(wanted.source, weights, wanted, where, own)
    model = _of_hub(wanted, text, where, own)
    return Model(model.source, model.ref, weights, model.recipe)


def _understand(wanted: Wanted, text: str, where: tuple[Path, ...], own: ModelRecipe | None) -> Model:
    if text.endswith((".yaml", ".yml")):
        own = recipes.load(expand(text, wanted.base), wanted.kinds)
        return _below(wanted, Model(text, refs.parse(own.model, wanted.revision or own.revision), None, own))
    if text.startswith((".", "/", "~")) or expand(text, wanted.base).is_dir():
        return _in_directory(text, _directory(text, wanted.base), wanted, where, own)
    return _below(wanted, _of_hub(wanted, text, where, own))


def _below(wanted: Wanted, model: Model) -> Model:
    """The model in the directory of models that was named: as it is there, else to be downloaded to there."""
    if wanted.root is None or model.ref is None:
        return model
    directory = expand(wanted.root, wanted.base) / model.ref.id
    is_there = (directory / "config.json").is_file() and store.flaw(directory) is None
    return replace(model, directory=directory) if is_there else replace(model, local_dir=directory)


def _in_directory(text: str, path: Path, wanted: Wanted, where: tuple[Path, ...], own: ModelRecipe | None) -> Model:
    return Model(text, None, path, own or recipes.find(f"{path.parent.name}/{path.name}", where, wanted.kinds))


def _of_hub(wanted: Wanted, text: str, where: tuple[Path, ...], own: ModelRecipe | None) -> Model:
    name, _, inline = text.partition("@")
    recipe = own or recipes.find(name, where, wanted.kinds)
    if recipe is None:
        if "/" not in text:
            raise UsageError(f"{text!r} is no hub id, directory or recipe", hint="a hub id looks like owner/name")
        return Model(text, refs.parse(text, wanted.revision), None, None)
    identity = name if own and "/" in name else recipe.model
    usual = recipe.revision if identity == recipe.model else None
    return Model(text, refs.parse(identity, wanted.revision or inline or usual), None, recipe)


def _recipe(text: str, wanted: Wanted, where: tuple[Path, ...]) -> ModelRecipe:
    if text.endswith((".yaml", ".yml")):
        return recipes.load(expand(text, wanted.base), wanted.kinds)
    found = recipes.find(text, where, wanted.kinds)
    if found is None:
        raise NotFoundError(f"no recipe {text!r}", hint="name its file, or leave it out")
    return found


def _directory(text: str, base: Path | None) -> Path:
    path = expand(text, base)
    if not path.exists():
        raise NotFoundError(f"no directory {text}", hint="give a model directory, or a hub id owner/name")
    return path.resolve()


def name_of(title: str) -> str:
    """A service name made of a model's title."""
    base = title.rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", base).strip("-._")[:63] or "llm"
