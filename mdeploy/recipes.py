"""Recipes: what is known to work for a model, or how an app is served, as YAML. Project's own before the user's
before the shipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.paths import Paths
from mdeploy.specs import AppRecipe, EmbedRecipe, ModelRecipe, Recipe

DEFAULT_LLM = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
DEFAULT_EMBED = "Qwen/Qwen3-Embedding-4B"
DEFAULT_GME = "iic/gme-Qwen2-VL-2B-Instruct"

LLM = ("llm",)
EMBEDDING = ("embed", "gme")


def directories(paths: Paths, cwd: Path) -> tuple[Path, ...]:
    """Where recipes are looked for, the first that has one wins."""
    here = Path(__file__).parent
    shipped = here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"
    return (cwd / "recipes", paths.home / "recipes", shipped)


def find(model: str, where: tuple[Path, ...], kinds: Collection[str] = LLM) -> ModelRecipe | None:
    """The recipe of a model id, or of a bare model name, of one of these kinds; None where nobody wrote one."""
    for path in _named(model, where):
        found = _read(path, "")
        if not isinstance(found, AppRecipe) and found.kind in kinds:
            return found
    return None


def find_app(name: str, where: tuple[Path, ...]) -> Path | None:
    """The file of an app's recipe by its name: `org/name` is org/name.yaml or org/name/recipe.yaml."""
    return next(_named(name, where), None)


def load(path: Path, kinds: Collection[str] = LLM) -> ModelRecipe:
    """Read a model's recipe. Raises ConfigError that names the file and every key that is wrong."""
    found = _read(path, f"mdeploy serve {next(iter(kinds))} MODEL needs none")
    if isinstance(found, AppRecipe) or found.kind not in kinds:
        raise ConfigError(f"recipe {path} is of kind {found.kind}", hint=f"mdeploy serve {found.kind} {path}")
    return found


def load_app(path: Path) -> AppRecipe:
    """Read an app's recipe. Raises as `load` does."""
    found = _read(path, "mdeploy serve app FILE.py needs none")
    if not isinstance(found, AppRecipe):
        raise ConfigError(f"recipe {path} is of kind {found.kind}", hint=f"mdeploy serve {found.kind} {path}")
    return found


def golden(model: str, where: tuple[Path, ...]) -> Path | None:
    """The file with vectors that a model is known to give, where its recipe names one. Raises as `load` does."""
    for path in _named(model, where):
        found = _read(path, "")
        if isinstance(found, EmbedRecipe) and found.golden:
            return path.parent / found.golden
    return None


def _named(name: str, where: tuple[Path, ...]) -> Iterator[Path]:
    for identity, path in _files(where):
        if name.lower() in (identity.lower(), identity.lower().rpartition("/")[2]):
            yield path


def _files(where: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    for directory in where:
        yield from ((f"{path.parent.name}/{path.stem}", path) for path in sorted(directory.glob("*/*.yaml")))
        for path in sorted(directory.glob("*/*/recipe.yaml")):
            yield f"{path.parent.parent.name}/{path.parent.name}", path


def _read(path: Path, without: str) -> ModelRecipe | AppRecipe:
    import yaml
    from pydantic import ValidationError

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _parsed(data)
    except FileNotFoundError as error:
        raise NotFoundError(f"no recipe {path}", hint=without) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(
            f"recipe {path}: {_wrong(error)}", hint="compare with the recipes shipped in recipes/"
        ) from error


_CLASSES: Mapping[str, type] = {"app": AppRecipe, "embed": EmbedRecipe, "gme": EmbedRecipe}


def _parsed(data: Any) -> ModelRecipe | AppRecipe:
    from pydantic import ConfigDict, TypeAdapter, with_config

    kind = data.get("kind") if isinstance(data, dict) else None
    strict: Any = with_config(ConfigDict(extra="forbid"))(_CLASSES.get(str(kind), Recipe))
    found: ModelRecipe | AppRecipe = TypeAdapter(strict).validate_python(data)
    return found


def _wrong(error: Any) -> str:
    """Every key that is wrong, once: a union complains of each of its types."""
    found: dict[str, str] = {}
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"] if part not in ("str", "int") and "[" not in str(part))
        found.setdefault(where or "the file", one["msg"])
    return "; ".join(f"{where}: {text}" for where, text in found.items())
