"""What one app service is told when it starts: a value, and the words of a command line that carry it.

The command line writes the words into a spec, the app's process reads them back. Nothing here looks at the
machine or imports a user's code; paths are absolute and stand in words of their own (`--path=/dir`), because
units find by them what a sandbox has to show.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_BODY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Run the workers as replicas in the cluster at `address` (IP:PORT), whose token is in `token_file`.

    `replicas` None grows with its nodes. `gpus` and `cpus` are what one replica takes. `model` is the model as the
    user named it: each node has it in a place of its own. `variables` are names of our environment that replicas
    shall see, separated by commas.
    """

    address: str = ""
    replicas: int | None = None
    gpus: float = 0.0
    cpus: float = 1.0
    token_file: str = ""
    model: str = ""
    variables: str = ""


@dataclass(frozen=True, slots=True)
class AppOptions:
    """One app service. None leaves a value to the handler's class.

    `handlers` are FILE.py, FILE.py:Class (absolute) or package.mod:Class. `paths` go to the front of the workers'
    sys.path, `python` is their interpreter. `devices` are GPU indices or `cpu`. Times are in seconds but for
    `max_wait_ms`. `config` overrides class attributes of single handlers, by their names.
    """

    service: str
    host: str
    port: int
    handlers: tuple[str, ...]
    paths: tuple[str, ...] = ()
    python: str = ""
    devices: tuple[str, ...] = ("cpu",)
    workers_per_device: int | None = None
    max_batch_size: int | None = None
    max_batch_cost: float | None = None
    max_wait_ms: float | None = None
    timeout: float | None = None
    queue_size: int | None = None
    max_body_bytes: int = DEFAULT_BODY_BYTES
    cors: tuple[str, ...] = ()
    drain_s: float = 30.0
    reload: bool = False
    access_log: bool = True
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cluster: ClusterOptions | None = None

    def argv(self) -> tuple[str, ...]:
        """The words after `python -m mdeploy.apps app`; what has its default is left out."""
        return tuple(_words(self))


def parse(argv: Sequence[str]) -> AppOptions:
    """The inverse of `AppOptions.argv`. Ends the program with status 2 for words it does not know."""
    found: dict[str, Any] = vars(_parser().parse_args(list(argv)))
    cluster = {name: found.pop(f"cluster_{name}") for name in _CLUSTER}
    found.update({name: tuple(found[name]) for name in _LISTS})
    found["devices"] = found["devices"] or ("cpu",)
    return AppOptions(**found, cluster=None if cluster["address"] is None else ClusterOptions(**cluster))


# field of a list -> its flag, given once for each value
_LISTS = {"handlers": "--handler", "paths": "--path", "devices": "--device", "cors": "--cors"}

_VALUES: Mapping[str, tuple[str, type]] = {
    "service": ("--service", str),
    "host": ("--host", str),
    "port": ("--port", int),
    "python": ("--python", str),
    "workers_per_device": ("--workers-per-device", int),
    "max_batch_size": ("--max-batch-size", int),
    "max_batch_cost": ("--max-batch-cost", float),
    "max_wait_ms": ("--max-wait-ms", float),
    "timeout": ("--timeout", float),
    "queue_size": ("--queue-size", int),
    "max_body_bytes": ("--max-body-bytes", int),
    "drain_s": ("--drain", float),
}
_CLUSTER: Mapping[str, tuple[str, type]] = {
    "address": ("--cluster", str),
    "replicas": ("--replicas", int),
    "gpus": ("--gpus-per-replica", float),
    "cpus": ("--cpus-per-replica", float),
    "token_file": ("--cluster-token", str),
    "model": ("--cluster-model", str),
    "variables": ("--cluster-variables", str),
}
_DEFAULTS = {"python": "", "max_body_bytes": DEFAULT_BODY_BYTES, "drain_s": 30.0}
_CLUSTER_DEFAULTS = {"gpus": 0.0, "cpus": 1.0, "token_file": "", "model": "", "variables": ""}
_REQUIRED = ("service", "host", "port")


def _words(options: AppOptions) -> Iterator[str]:
    for name, (flag, _) in _VALUES.items():
        value = getattr(options, name)
        if name in _REQUIRED or value != _DEFAULTS.get(name):
            yield f"{flag}={value}"
    for name, flag in _LISTS.items():
        yield from (f"{flag}={value}" for value in getattr(options, name))
    if options.reload:
        yield "--reload"
    if not options.access_log:
        yield "--no-access-log"
    if options.config:
        yield f"--config={json.dumps(options.config, sort_keys=True, separators=(',', ':'))}"
    if options.cluster is not None:
        yield from _cluster_words(options.cluster)


def _cluster_words(cluster: ClusterOptions) -> Iterator[str]:
    for name, (flag, _) in _CLUSTER.items():
        value = getattr(cluster, name)
        if name == "address" or value != _CLUSTER_DEFAULTS.get(name):
            yield f"{flag}={value}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mdeploy.apps app", allow_abbrev=False)
    for name, (flag, kind) in _VALUES.items():
        parser.add_argument(flag, dest=name, type=kind, default=_DEFAULTS.get(name), required=name in _REQUIRED)
    for name, (flag, kind) in _CLUSTER.items():
        parser.add_argument(flag, dest=f"cluster_{name}", type=kind, default=_CLUSTER_DEFAULTS.get(name))
    for name, flag in _LISTS.items():
        parser.add_argument(flag, dest=name, action="append", default=[])
    parser.add_argument("--reload", action="store_true")
    parser.add_argument("--no-access-log", dest="access_log", action="store_false")
    parser.add_argument("--config", type=json.loads, default={})
    return parser
