"""Recipes: what is known to work for a model, as YAML. Project's own before the user's before the shipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.paths import Paths
from mdeploy.specs import Recipe

DEFAULT_LLM = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def directories(paths: Paths, cwd: Path) -> tuple[Path, ...]:
    """Where recipes are looked for, the first that has one wins."""
    here = Path(__file__).parent
    shipped = here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"
    return (cwd / "recipes", paths.home / "recipes", shipped)


def find(model: str, where: tuple[Path, ...]) -> Recipe | None:
    """The recipe of a model id, or of a bare model name; None where nobody wrote one."""
    for path in _files(where):
        identity = f"{path.parent.name}/{path.stem}"
        if model.lower() in (identity.lower(), path.stem.lower()):
            return load(path)
    return None


def _files(where: tuple[Path, ...]) -> Iterator[Path]:
    for directory in where:
        yield from sorted(directory.glob("*/*.yaml"))


def load(path: Path) -> Recipe:
    """Read one recipe. Raises ConfigError that names the file and every key that is wrong."""
    import yaml
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        strict = with_config(ConfigDict(extra="forbid"))(Recipe)
        return TypeAdapter(strict).validate_python(data)
    except FileNotFoundError as error:
        raise NotFoundError(f"no recipe {path}", hint="mdeploy serve llm MODEL needs none") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"recipe {path}: {wrong}", hint="compare with the recipes shipped in recipes/") from error
