"""Keys of a service on their way from a file to its engine and to those who ask it how it is.

They come from 0600 files, one key a line, or from what systemd put into the credentials directory. An
engine gets the first key itself, or the path of the file where its variable ends in _FILE. A key that is
missing or empty ends the start: nothing ever runs unprotected that was to have a key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mdeploy.errors import ConfigError
from mdeploy.specs import Manager, ServiceSpec


def read(secrets: Mapping[str, str], manager: Manager) -> dict[str, str]:
    """The values of an engine's secret variables. Raises ConfigError."""
    return {variable: _value(variable, _where(Path(file), manager)) for variable, file in secrets.items()}


def _value(variable: str, file: Path) -> str:
    key = first_key(file)
    return str(file) if variable.endswith("_FILE") else key


def headers(spec: ServiceSpec, manager: Manager) -> dict[str, str]:
    """What a request to the service must carry. Raises ConfigError."""
    file = spec.secrets.get(spec.probe.bearer or "")
    return {"Authorization": f"Bearer {first_key(_where(Path(file), manager))}"} if file else {}


def _where(file: Path, manager: Manager) -> Path:
    """systemd hands a file over under its own name, in a directory only the service can read."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(directory) / file.name if manager == "systemd" and directory else file


def first_key(path: Path) -> str:
    """The key in use: the first of a file. Raises ConfigError for a missing or empty one."""
    service = path.name.removesuffix(".api-key")
    hint = f"mdeploy keys add {service}, or serve again with the key"
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the key in {path}: {why}", hint=hint) from error
    if not lines:
        raise ConfigError(f"{path} is empty: it must hold the key", hint=hint)
    return lines[0]
