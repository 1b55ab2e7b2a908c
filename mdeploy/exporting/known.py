"""What is known of a service that an export needs: its spec, the options of an app, the keys it asks for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mdeploy import credentials
from mdeploy.apps.embed import options as embedding
from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.errors import ConfigError, UsageError
from mdeploy.recipes import EMBEDDING
from mdeploy.serving import options
from mdeploy.serving.options import AppOptions
from mdeploy.settings import Settings
from mdeploy.specs import ServiceSpec
from mdeploy.supervise.secrets import first_key
from mdeploy.supervise.state import ServiceFiles

T = TypeVar("T")


def spec_of(settings: Settings, name: str) -> ServiceSpec:
    """The spec of a service, running or not. Raises NotFoundError, ConfigError for a damaged one."""
    return ServiceFiles(settings.paths, name).spec()


def check_kind(spec: ServiceSpec) -> None:
    """Raise UsageError for a service that no client asks anything: a machine's part of a cluster."""
    if spec.kind not in ("llm", "app", *EMBEDDING):
        raise UsageError(f"{spec.name}: services of kind {spec.kind} cannot be exported", hint="mdeploy ps lists kinds")


def app_options(spec: ServiceSpec) -> AppOptions:
    """What an app was told, of whichever kind. Raises ConfigError for words of another version."""
    return embed_options(spec).app if spec.kind in EMBEDDING else _parsed(spec, options.parse)


def embed_options(spec: ServiceSpec) -> EmbedOptions:
    """What an embedding service was told. Raises as `app_options` does."""
    return _parsed(spec, embedding.parse)


def _parsed(spec: ServiceSpec, parse: Callable[[Sequence[str]], T]) -> T:
    words = spec.argv[spec.argv.index("mdeploy.apps") + 2 :] if "mdeploy.apps" in spec.argv else ()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse(words)
    except SystemExit as error:
        hint = f"serve it again: mdeploy serve {spec.kind} … --name {spec.name}"
        raise ConfigError(f"{spec.name}: its command is another version's", hint=hint) from error


def keys_of(spec: ServiceSpec) -> tuple[str, ...]:
    """Every key the service takes; none where it asks for none. Raises ConfigError where they cannot be read."""
    found: dict[str, None] = {}
    for file in map(Path, spec.secrets.values()):
        with credentials.private(file):
            first_key(file)  # says what is wrong with a file that holds none
            found.update(dict.fromkeys(file.read_text(encoding="utf-8").split()))
    return tuple(found)
