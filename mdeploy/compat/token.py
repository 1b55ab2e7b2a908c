"""The secret that workers and controller of modelserve scripts share: without it nobody joins and nobody is served.

On one machine, and under one user, both find the same file by themselves. Other machines get a copy of it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from mdeploy.errors import ConfigError
from mdeploy.paths import Paths

VARIABLE = "MDEPLOY_MODELSERVE_TOKEN_FILE"


def file(env: Mapping[str, str], paths: Paths) -> Path:
    """The file that holds the token: what the variable names, else our own, which is made where it is missing.

    Raises ConfigError for one that is missing, empty or readable by everybody.
    """
    named = env.get(VARIABLE)
    path = Path(named).expanduser().absolute() if named else paths.secrets / "modelserve.token"
    if not named:
        _make(path)
    read(path)
    return path


def read(path: Path) -> str:
    """The token in a file. Raises ConfigError."""
    hint = f"copy it from the controller's machine and name it in {VARIABLE}"
    try:
        mode, words = path.stat().st_mode, path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"cannot read the token in {path}: {why}", hint=hint) from error
    if mode & 0o007:
        raise ConfigError(f"everybody may read the token in {path}", hint=f"chmod 600 {path}")
    if len(words) != 1 or len(words[0]) < 16:
        raise ConfigError(f"{path} must hold one token of 16 characters or more", hint=hint)
    return words[0]


def _make(path: Path) -> None:
    """Controller and workers start together: whoever comes first makes the file, and it is whole when it appears."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_urlsafe(32) + "\n")
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            return
        finally:
            draft.unlink()
    except OSError as error:
        hint = "set MDEPLOY_HOME to a directory you may write"
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint=hint) from error
