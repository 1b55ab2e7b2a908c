"""The API key of a service: where it comes from, whether it may be one, and the file it is kept in.

A key's value never enters a spec, an argv, a log or a message. It lies in HOME/secrets/NAME.api-key,
0600, one key a line; its fingerprint is what may be shown and compared. Whoever changes that file holds
HOME/secrets/.NAME.lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mdeploy.errors import ConfigError, MdeployError, UsageError
from mdeploy.paths import Paths, expand
from mdeploy.settings import Settings
from mdeploy.supervise import state
from mdeploy.supervise.secrets import first_key

_VLLM_VARIABLE = "VLLM_API_KEY"
_FILE_VARIABLE = "MDEPLOY_API_KEYS_FILE"
"""Where our own apps find the name of the file, which may hold several keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key and where it comes from; one that `is_kept` lies in the service's file already."""

    origin: str
    value: str = field(repr=False)
    is_kept: bool = False


def check_key(text: str) -> str:
    """The key itself, if it can stand in an HTTP header and a line of a file. Raises UsageError, key unsaid."""
    if not re.fullmatch(r"[!-~]+", text):
        raise UsageError("the API key must be printable ASCII without blanks", hint="set MDEPLOY_API_KEY to another")
    return text


def new_key() -> str:
    """A key nobody can guess: 256 random bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def fingerprint(key: str) -> str:
    """What tells two keys apart and gives none away: the first 8 hex digits of SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def key_file(paths: Paths, name: str) -> Path:
    """Where the keys of a service are kept."""
    return paths.secrets / f"{name}.api-key"


def variable(*, of_vllm: bool) -> str:
    """The environment variable by which vLLM gets its key, or an app of ours the name of its file of keys."""
    return _VLLM_VARIABLE if of_vllm else _FILE_VARIABLE


def secrets_of(paths: Paths, name: str, *, of_vllm: bool) -> dict[str, str]:
    """`ServiceSpec.secrets` of a service that asks for its key."""
    return {variable(of_vllm=of_vllm): str(key_file(paths, name))}


def kept(paths: Paths, name: str) -> Key | None:
    """The key in a service's file; None where there is no file. Raises ConfigError for an empty one."""
    file = key_file(paths, name)
    return Key("kept", first_key(file), is_kept=True) if file.exists() else None


def find(settings: Settings, name: str, declared: str | None, base: Path) -> Key | None:
    """The key a service shall ask for: what was declared, else MDEPLOY_API_KEY, else the one that is kept.

    `declared` is `generate`, `env:VARIABLE` or `file:PATH`, relative to `base`. None means that
    nobody asked for a key. Raises ConfigError or UsageError for a key that cannot be had.
    """
    if declared is None:
        setting = settings.get("api_key")
        return Key("MDEPLOY_API_KEY", check_key(setting)) if setting else kept(settings.paths, name)
    if declared == "generate":
        return kept(settings.paths, name) or Key("generate", new_key())
    how, _, what = declared.partition(":")
    value = _from_variable(what) if how == "env" else _from_file(expand(what, base))
    try:
        return Key(declared, check_key(value))
    except UsageError as error:
        raise ConfigError(f"{declared}: {error.message}", hint="write another key there") from error


@contextlib.contextmanager
def locked(paths: Paths, name: str) -> Iterator[None]:
    """One change of a service's keys at a time: of two new ones one would be void as soon as it is printed.

    Raises MdeployError for the second, ConfigError where the keys are another user's.
    """
    path = paths.secrets / f".{name}.lock"
    state.make_private(path.parent)
    with private(path):
        lock = path.open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MdeployError(f"another command changes the keys of {name}", hint="wait for it to end") from error
        yield


@contextlib.contextmanager
def private(path: Path) -> Iterator[None]:
    """A key file that is not ours to read or write is told as such."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror}", hint="as its owner: sudo mdeploy …") from error


def keep(paths: Paths, name: str, key: Key | None) -> None:
    """Write a key down for the service; a file that holds it already, first of all, is left as it is.

    Call it under `locked`.
    """
    file = key_file(paths, name)
    if key and not key.is_kept and not (file.exists() and first_key(file) == key.value):
        state.make_private(file.parent)
        state.write_atomically(file, f"{key.value}\n".encode())


def _from_variable(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(f"the key is to come from ${name}, which is not set", hint=f"export {name}=…")
    return value


def _from_file(path: Path) -> str:
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"cannot read the key in {path}: {why}", hint="auth: {key: generate} makes one") from error
    if mode & 0o007:
        raise ConfigError(f"everybody may read the key in {path}", hint=f"chmod 600 {path}")
    return text.strip()
