"""What is the same for services of every kind before they have a spec: their terms, and a draft with a place to fill.

A draft holds all that is quick to look up and quick to refuse. What an engine or an app adds is in prepare_llm,
prepare_app and prepare_embed.
"""

from __future__ import annotations

import ipaddress
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mdeploy import credentials, gpus
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.credentials import Key
from mdeploy.errors import ConfigError, UsageError
from mdeploy.reservations import Neighbours
from mdeploy.resolve import Model
from mdeploy.serving import cluster_node
from mdeploy.settings import Settings
from mdeploy.specs import Gpu, GpuPlan, Limits, ModelFacts, RestartPolicy, ServiceSpec
from mdeploy.supervise import state

# TOKENIZERS_PARALLELISM and MAX_TOKENS hold none
_SECRET_NAME = re.compile("KEY|TOKEN(?!IZER|S(?:_|$))|SECRET|PASSW")
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@dataclass(frozen=True, slots=True)
class Terms:
    """What a user may say about a service of any kind; None leaves it to settings and to what is free.

    `key` says where its API key comes from (see credentials.find). `base` is where relative paths start: the
    directory of the file that declares it, None for a command line.
    """

    name: str | None = None
    host: str | None = None
    port: int | None = None
    insecure: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    restart: RestartPolicy = "on-failure"
    depends_on: tuple[str, ...] = ()
    key: str | None = None
    base: Path | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model lies (None where a service needs none), and what its checkpoint says of itself.

    `facts` are those of a language model, `checkpoint` of an embedding model.
    """

    directory: Path | None
    facts: ModelFacts | None = None
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class Draft(ABC):
    """A service looked up and checked, that has no place on the machine yet."""

    terms: Terms
    name: str
    host: str
    key: Key | None
    model: Model | None

    @abstractmethod
    def weigh(self, directory: Path | None) -> Weights:
        """Look at the model in this directory. Raises ConfigError for a damaged one."""

    @abstractmethod
    def plan(self, weights: Weights, others: Neighbours, before: tuple[int, ...]) -> GpuPlan | None:
        """Where it runs beside its neighbours, on the devices it had `before` if it can. Raises DoesNotFitError."""

    @abstractmethod
    def spec(self, settings: Settings, weights: Weights, plan: GpuPlan | None, port: int) -> ServiceSpec:
        """The service as it can be run."""

    @abstractmethod
    def stands_for(self) -> Mapping[str, str]:
        """What is behind the names in the request, in words that change when that does."""


def settled(settings: Settings, terms: Terms, name: str) -> tuple[str, str, Key | None]:
    """Name, address and key of a service. Raises UsageError for what cannot be, or is open to other machines."""
    name = state.check_name(terms.name or name)
    if name == cluster_node.SERVICE:
        raise UsageError(f"{name} is the name of this machine's part of a cluster", hint="--name ANOTHER")
    host = terms.host or settings.require("host")
    key = credentials.find(settings, name, terms.key, terms.base or Path.cwd())
    if not (terms.insecure or key or is_loopback(host)):
        raise _exposed(host, in_file=terms.base is not None)
    _check_limits(terms.limits)
    return name, host, key


def asked_port(settings: Settings, flag: int | None) -> int | None:
    """The port a user named, by flag or setting. Raises UsageError for what is none."""
    text = settings.get("port")
    try:
        port = flag if flag is not None else int(text) if text else None
    except ValueError as error:
        raise ConfigError(f"port {text!r} is no number", hint="set MDEPLOY_PORT to one") from error
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"--port {port}: between 1 and 65535")
    return port


def secret_names(env: Mapping[str, str]) -> list[str]:
    """Variables whose names say that they hold a secret: those do not belong in files that are handed around."""
    return sorted(name for name in env if _SECRET_NAME.search(name.upper()))


def device_names(env: Mapping[str, str]) -> list[str]:
    """Variables that choose devices, which mdeploy does itself."""
    return [name for name in _DEVICE_VARIABLES if name in env]


def check_environment(whose: str, env: Mapping[str, str], hint: str) -> None:
    """A recipe is a public file, a spec and a dry run are shown: a key does not belong in any. Raises ConfigError."""
    secret = secret_names(env)
    if secret:
        raise ConfigError(f"{whose} sets {', '.join(secret)}: secrets do not belong in recipes and specs", hint=hint)


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_gpus(*, named: bool) -> tuple[Gpu, ...]:
    """The GPUs of this machine; unless the user names some, those that CUDA_VISIBLE_DEVICES leaves."""
    return gpus.visible(gpus.probe(), None if named else os.environ.get("CUDA_VISIBLE_DEVICES"))


def _check_limits(limits: Limits) -> None:
    if not 1 <= limits.start_timeout_s < float("inf"):
        raise UsageError(f"--start-timeout {limits.start_timeout_s}: a number of seconds, at least 1")
    if not 0 <= limits.stop_timeout_s < float("inf"):
        raise UsageError(f"--drain {limits.stop_timeout_s}: a number of seconds, at least 0")


def _exposed(host: str, *, in_file: bool) -> UsageError:
    by_flag = "export MDEPLOY_API_KEY=…, or keep --host 127.0.0.1, or say --insecure"
    by_key = "auth: {key: generate}, or keep host: 127.0.0.1, or say insecure: true"
    text = f"{host} can be reached from other machines, and no API key is set"
    return UsageError(text, hint=by_key if in_file else by_flag)
