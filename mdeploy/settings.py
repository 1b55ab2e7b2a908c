"""One place that knows where a value came from: flag > environment > .env > config.yaml > default.

A setting has one name in config.yaml and one environment variable. Files are only opened
when they exist, and their parsers only imported then: `mdeploy ps` must stay quick.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdeploy.errors import ConfigError
from mdeploy.paths import Paths, default_home, expand

DEFAULT_ENDPOINT = "https://www.modelscope.cn"

# name in config.yaml -> environment variable
VARIABLES = {
    "home": "MDEPLOY_HOME",
    "host": "MDEPLOY_HOST",
    "port": "MDEPLOY_PORT",
    "engine": "MDEPLOY_ENGINE",
    "api_key": "MDEPLOY_API_KEY",
    "cache_dir": "MODELSCOPE_CACHE",
    "endpoint": "MODELSCOPE_ENDPOINT",
    "token": "MODELSCOPE_API_TOKEN",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and the place that decided it, so that `why?` has an answer."""

    value: str | None
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, resolved once at start."""

    values: Mapping[str, Setting]

    def get(self, name: str) -> str | None:
        """The value of `name`, None where nobody set it."""
        return self.values[name].value

    def require(self, name: str) -> str:
        """The value of a setting that always has a default."""
        value = self.values[name].value
        if value is None:
            raise ConfigError(f"setting {name!r} has no value", hint=f"set {VARIABLES[name]}")
        return value

    @property
    def paths(self) -> Paths:
        """The disk tree these settings point at."""
        return Paths(expand(self.require("home")))


def load(
    flags: Mapping[str, str | None] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Settings:
    """Resolve every setting.

    Raises ConfigError for a .env or config.yaml that cannot be read or holds unknown keys.
    """
    env = os.environ if env is None else env
    flags = flags or {}
    dotenv = _read_dotenv((cwd or Path.cwd()) / ".env")
    defaults = _defaults(env)
    home = flags.get("home") or env.get("MDEPLOY_HOME") or dotenv.get("MDEPLOY_HOME") or defaults["home"]
    file = _read_config(Paths(expand(str(home))).config)
    values = {}
    for name, variable in VARIABLES.items():
        layers = (
            (flags.get(name), "flag"),
            (env.get(variable), f"environment {variable}"),
            (dotenv.get(variable), ".env"),
            (file.get(name), "config.yaml"),
            (defaults.get(name), "default"),
        )
        values[name] = next((Setting(v, origin) for v, origin in layers if v), Setting(None, "unset"))
    return Settings(values)


def named(names: Iterable[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> dict[str, Setting]:
    """Variables that are no settings of ours, by name, from the environment, else from .env; those that are set.

    Raises ConfigError for a .env that cannot be read.
    """
    env = os.environ if env is None else env
    dotenv = _read_dotenv((cwd or Path.cwd()) / ".env")
    found: dict[str, Setting] = {}
    for name in names:
        if env.get(name) or dotenv.get(name):
            found[name] = Setting(env.get(name) or dotenv[name], "environment" if env.get(name) else ".env")
    return found


def tuning(prefixes: tuple[str, ...], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> dict[str, str]:
    """Variables whose names begin so, from .env and the environment, which wins."""
    both = {**_read_dotenv((cwd or Path.cwd()) / ".env"), **(os.environ if env is None else env)}
    return {name: value for name, value in sorted(both.items()) if name.startswith(prefixes)}


def _defaults(env: Mapping[str, str]) -> dict[str, str]:
    return {
        "home": str(default_home(env)),
        "host": "127.0.0.1",
        "cache_dir": str(expand(env.get("HOME", "~")) / ".cache" / "modelscope"),
        "endpoint": DEFAULT_ENDPOINT,
    }


def _read_dotenv(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    try:
        return {k: v for k, v in dotenv_values(path, interpolate=False).items() if v}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _read_config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not a {type(data).__name__}")
    unknown = sorted(set(map(str, data)) - (set(VARIABLES) - {"home"}))
    if unknown:
        known = ", ".join(sorted(set(VARIABLES) - {"home"}))
        raise ConfigError(f"{path}: unknown setting {', '.join(unknown)}", hint=f"known settings: {known}")
    return {str(k): str(v) for k, v in data.items() if v is not None}
