"""From what a user asked for to a spec that can run: model, engine, key, plan, port.

Two steps, so that many services can be checked before any of them is touched: `draft` looks up all
that is quick, `place` chooses devices and a port beside the neighbours.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mdeploy import credentials, dispatch, gpus, reservations, resolve
from mdeploy.credentials import KEY_VARIABLE as KEY_VARIABLE
from mdeploy.credentials import Key
from mdeploy.engines import store as engine_store
from mdeploy.errors import ConfigError, MdeployError, UsageError
from mdeploy.llm import command, facts, plan
from mdeploy.paths import Paths, expand
from mdeploy.reservations import Neighbours
from mdeploy.resolve import Model, Wanted
from mdeploy.settings import Settings
from mdeploy.specs import (
    Engine,
    GpuPlan,
    Limits,
    LlmOptions,
    LocalModel,
    ModelFacts,
    ModelRef,
    Probe,
    RestartPolicy,
    Say,
    ServiceSpec,
)
from mdeploy.supervise import state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.state import ServiceFiles

if TYPE_CHECKING:
    from mdeploy.hub.client import Progress

_UNKNOWN_FACTS = ModelFacts("unknown", "auto", 0, None, None, None, None, None, chat_template=False)
_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD")


@dataclass(frozen=True, slots=True)
class LlmRequest:
    """What an LLM service shall be, before anything is looked up.

    `key` says where its API key comes from (see credentials.find), None leaves it to the settings.
    """

    wanted: Wanted
    wish: LlmOptions = field(default_factory=LlmOptions)
    name: str | None = None
    host: str | None = None
    port: int | None = None
    insecure: bool = False
    engine: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    restart: RestartPolicy = "on-failure"
    depends_on: tuple[str, ...] = ()
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A request with everything looked up that is quick to find and quick to refuse."""

    request: LlmRequest
    name: str
    host: str
    model: Model
    engine: Engine
    extra: tuple[str, ...]
    key: Key | None


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model lies, and what its checkpoint says of itself."""

    directory: Path
    facts: ModelFacts


def prepare_llm(
    settings: Settings, request: LlmRequest, *, dry_run: bool, progress: Progress | None, say: Say
) -> ServiceSpec:
    """Everything between a command line and a spec: look up, check, download, plan, render, save.

    What is quick to refuse is refused before a download. With `dry_run` nothing is fetched or
    written, and a model that is not there is planned without its facts. The service's GPUs and
    port stay claimed for as long as this process lives.
    """
    asked = draft(settings, request)
    files = ServiceFiles(settings.paths, asked.name)
    if not dry_run:
        _check_free(files, asked.host, request.port)
    weights = fetch(settings, asked, dry_run=dry_run, progress=progress, say=say)
    if asked.key and asked.key.is_kept:
        say(f"{asked.name} asks for the key it has; without one: mdeploy keys rm {asked.name}")
    if dry_run:
        return place(settings, asked, weights, reservations.neighbours(settings.paths, [asked.name]))
    with reservations.locked(settings.paths):
        spec = place(settings, asked, weights, reservations.neighbours(settings.paths, [asked.name]))
        reservations.claim(settings.paths, spec)
        save(settings, spec, asked.key)
    return spec


def draft(settings: Settings, request: LlmRequest) -> Draft:
    """Look everything up that needs no download. Raises what is wrong with the request."""
    model = resolve.understand(settings.paths, request.wanted)
    name = state.check_name(request.name or resolve.name_of(model.title))
    host = request.host or settings.require("host")
    key = credentials.find(settings, name, request.key, request.wanted.base or Path.cwd())
    if not (request.insecure or key or is_loopback(host)):
        raise _exposed(host, in_file=request.wanted.base is not None)
    engine = engine_store.find(settings.paths.engines, request.engine or settings.get("engine"), _has_gpu)
    extra = (*(model.recipe.args if model.recipe else ()), *request.wish.extra)
    command.check_extra(extra, command.known_flags(engine.python), engine.version)
    if model.recipe:
        _check_environment(f"the recipe of {model.recipe.model}", model.recipe.env)
    _check_limits(request.limits)
    return Draft(request, name, host, model, engine, extra, key)


def fetch(settings: Settings, asked: Draft, *, dry_run: bool, progress: Progress | None, say: Say) -> Weights:
    """The model on this disk, downloaded where it is not; with `dry_run` only said to be missing."""
    directory, ref = directory_of(settings, asked.model), asked.model.ref
    if asked.model.directory is None and ref and not _is_here(settings, ref):
        if dry_run:
            say(f"{ref} is not downloaded yet; a real run would fetch it first")
        else:
            say(f"{ref} is not here yet: downloading")
            directory = Path(download(settings, ref, progress=progress).path)
    if not directory.exists():
        return Weights(directory, _UNKNOWN_FACTS)
    return Weights(directory, facts.read(directory, weights=not command.loads_no_weights(asked.extra)))


def directory_of(settings: Settings, model: Model) -> Path:
    """Where a model is, or would be once it is downloaded."""
    if model.directory is not None:
        return model.directory
    from mdeploy.hub import store

    assert model.ref is not None
    cache = expand(settings.require("cache_dir"))
    return store.locate(model.ref, cache) or store.snapshot_dir(model.ref, cache)


def _is_here(settings: Settings, ref: ModelRef) -> bool:
    from mdeploy.hub import store

    return store.locate(ref, expand(settings.require("cache_dir"))) is not None


def place(
    settings: Settings, asked: Draft, weights: Weights, others: Neighbours, before: ServiceSpec | None = None
) -> ServiceSpec:
    """The spec of a service beside its neighbours; what nobody named stays as it was `before`, where it can.

    Raises DoesNotFitError without GPUs that nobody has, ConfigError without a port.
    """
    chosen = _plan(asked, weights.facts, others, reservations.gpus_of(before) if before else ())
    port = asked.request.port or _port(settings.paths, asked, others, before)
    return _spec(settings, asked, weights.directory, chosen, port)


def save(settings: Settings, spec: ServiceSpec, key: Key | None) -> None:
    """Write a spec and its key down, so that `mdeploy run NAME` has all it needs; never under a running service.

    Raises MdeployError where `mdeploy keys` changes the keys now, or has given it one since it was asked for none.
    """
    paths, name = settings.paths, spec.name
    files = ServiceFiles(paths, name)
    with credentials.locked(paths, name), files.locked():
        if not spec.secrets and credentials.key_file(paths, name).exists():
            raise MdeployError(f"{name} has got a key meanwhile", hint="run it again; it will ask for that key")
        credentials.keep(paths, name, key)
        dispatch.write_spec(files, spec)


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


def download(
    settings: Settings, ref: ModelRef, *, local_dir: Path | None = None, progress: Progress | None = None
) -> LocalModel:
    """Fetch a model with the hub, cache and token the settings name."""
    from mdeploy.hub import client

    return client.download(
        ref,
        cache_dir=expand(settings.require("cache_dir")),
        local_dir=local_dir,
        endpoint=settings.require("endpoint"),
        token=settings.get("token"),
        progress=progress,
    )


def _check_environment(whose: str, env: Mapping[str, str]) -> None:
    """A recipe is a public file: a key in it would be in the spec and in every dry run too."""
    secret = secret_names(env)
    if secret:
        raise ConfigError(
            f"{whose} sets {', '.join(secret)}: secrets do not belong in recipes",
            hint="export MDEPLOY_API_KEY instead",
        )


def _check_limits(limits: Limits) -> None:
    if not 1 <= limits.start_timeout_s < float("inf"):
        raise UsageError(f"--start-timeout {limits.start_timeout_s}: a number of seconds, at least 1")
    if not 0 <= limits.stop_timeout_s < float("inf"):
        raise UsageError(f"--drain {limits.stop_timeout_s}: a number of seconds, at least 0")


def _check_free(files: ServiceFiles, host: str, port: int | None) -> None:
    if files.is_supervised():
        raise state.already_running(files.name)
    if port is not None:
        check_port(host, port)


def _exposed(host: str, *, in_file: bool) -> UsageError:
    by_flag = "export MDEPLOY_API_KEY=…, or keep --host 127.0.0.1, or say --insecure"
    by_key = "auth: {key: generate}, or keep host: 127.0.0.1, or say insecure: true"
    text = f"{host} can be reached from other machines, and no API key is set"
    return UsageError(text, hint=by_key if in_file else by_flag)


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _has_gpu() -> bool:
    return bool(gpus.probe())


def _port(paths: Paths, asked: Draft, others: Neighbours, before: ServiceSpec | None) -> int:
    if before and before.port not in others.ports:
        runs = ServiceFiles(paths, asked.name).is_supervised()
        if runs or reservations.can_listen(asked.host, before.port):
            return before.port
    return reservations.free_port(asked.host, others)


def _plan(asked: Draft, known: ModelFacts, others: Neighbours, before: tuple[int, ...]) -> GpuPlan:
    wish, recipe = asked.request.wish, asked.model.recipe
    if asked.engine.variant == "cuda":
        allowed = gpus.visible(gpus.probe(), None if wish.gpus else os.environ.get("CUDA_VISIBLE_DEVICES"))
        return plan.plan_cuda(known, wish, recipe, allowed, others.gpus, before)
    import psutil

    cores = len(os.sched_getaffinity(0))
    return plan.plan_cpu(known, wish, recipe, cores, max(0, psutil.virtual_memory().available - others.memory))


def _spec(settings: Settings, asked: Draft, directory: Path, chosen: GpuPlan, port: int) -> ServiceSpec:
    request, model, name = asked.request, asked.model, asked.name
    names = tuple(n for n in dict.fromkeys((model.title, name)) if not n.startswith("-"))
    drain_s = request.limits.stop_timeout_s
    body = {"model": name, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
    bearer = KEY_VARIABLE if asked.key else None
    return ServiceSpec(
        name=name,
        kind="llm",
        argv=command.argv(asked.engine, directory, names, asked.host, port, chosen, asked.extra, drain_s),
        env={**command.environment(chosen), **(model.recipe.env if model.recipe else {}), **request.env},
        cwd=str(settings.paths.service(name)),
        host=asked.host,
        port=port,
        probe=Probe("/health", "/v1/completions", body, bearer=bearer, work_metrics=command.WORK_METRICS),
        model=name if model.title.startswith("-") else model.title,
        source=model.source,
        plan=chosen,
        secrets={KEY_VARIABLE: str(credentials.key_file(settings.paths, name))} if asked.key else {},
        limits=request.limits,
        restart=request.restart,
        depends_on=request.depends_on,
    )
