"""From what a user named to a spec that can run: model, engine, plan, port, key."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mdeploy import gpus, recipes
from mdeploy.engines import store as engine_store
from mdeploy.errors import ConfigError, NotFoundError, UsageError
from mdeploy.llm import command, facts, plan
from mdeploy.paths import Paths, expand
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
    Recipe,
    Say,
    ServiceSpec,
)
from mdeploy.supervise import state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.state import ServiceFiles

if TYPE_CHECKING:
    from mdeploy.hub.client import Progress

FIRST_PORT = 8000
_PORTS = 100
KEY_VARIABLE = "VLLM_API_KEY"
_UNKNOWN_FACTS = ModelFacts("unknown", "auto", 0, None, None, None, None, None, chat_template=False)


@dataclass(frozen=True, slots=True)
class LlmRequest:
    """What `serve llm` was asked, before anything is looked up."""

    model: str
    wish: LlmOptions
    name: str | None = None
    host: str | None = None
    port: int | None = None
    insecure: bool = False
    engine: str | None = None
    revision: str | None = None
    start_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Model:
    """A model argument, understood: where it is or would be, and what clients call it."""

    source: str
    ref: ModelRef | None
    directory: Path | None
    recipe: Recipe | None

    @property
    def title(self) -> str:
        return self.ref.id if self.ref else Path(self.source).resolve().name


def prepare_llm(
    settings: Settings, request: LlmRequest, *, dry_run: bool, progress: Progress | None, say: Say
) -> ServiceSpec:
    """Everything between a command line and a spec: look up, check, download, plan, render, save.

    What is quick to refuse is refused before a download. With `dry_run` nothing is fetched or
    written, and a model that is not there is planned without its facts.
    """
    model = _understand(settings, request)
    name = state.check_name(request.name or _name_of(model.title))
    host = request.host or settings.require("host")
    _check_exposure(host, settings, request.insecure)
    engine = engine_store.find(settings.paths.engines, request.engine or settings.get("engine"), _has_gpu)
    extra = (*(model.recipe.args if model.recipe else ()), *request.wish.extra)
    command.check_extra(extra, command.known_flags(engine.python), engine.version)
    _check_environment(model.recipe)
    if request.start_timeout_s is not None and not 1 <= request.start_timeout_s < float("inf"):
        raise UsageError(f"--start-timeout {request.start_timeout_s}: a number of seconds, at least 1")
    asked = _asked_port(settings, request.port)
    files = ServiceFiles(settings.paths, name)
    if not dry_run:
        _check_free(files, host, asked)
    directory = _local(settings, model, dry_run, progress, say)
    weights = not command.loads_no_weights(extra)
    known = facts.read(directory, weights=weights) if directory.exists() else _UNKNOWN_FACTS
    chosen = _plan(engine, known, request.wish, model.recipe)

    def render(port: int) -> ServiceSpec:
        names = tuple(n for n in dict.fromkeys((model.title, name)) if not n.startswith("-"))
        argv = command.argv(engine, directory, names, host, port, chosen, extra)
        return _spec(settings, name, model, argv, chosen, host, port, request.start_timeout_s)

    if dry_run:
        return render(asked or _free_port(settings.paths, name, host))
    with _ports_locked(settings.paths):
        spec = render(asked or _free_port(settings.paths, name, host))
        _save(settings, files, spec)
    return spec


def _check_environment(recipe: Recipe | None) -> None:
    """A recipe is a public file: a key in it would be in the spec and in every dry run too."""
    secret = sorted(name for name in (recipe.env if recipe else {}) if re.search("KEY|TOKEN|SECRET|PASSWORD", name))
    if recipe and secret:
        raise ConfigError(
            f"the recipe of {recipe.model} sets {', '.join(secret)}: secrets do not belong in recipes",
            hint="export MDEPLOY_API_KEY instead",
        )


def _check_free(files: ServiceFiles, host: str, port: int | None) -> None:
    if files.is_supervised():
        raise state.already_running(files.name)
    if port is not None:
        check_port(host, port)


def _understand(settings: Settings, request: LlmRequest) -> _Model:
    from mdeploy.hub import refs

    text = request.model
    where = recipes.directories(settings.paths, Path.cwd())
    if text.endswith((".yaml", ".yml")):
        own = recipes.load(Path(text))
        return _Model(text, refs.parse(own.model, request.revision or own.revision), None, own)
    path = expand(text)
    if text.startswith((".", "/", "~")) or path.is_dir():
        if not path.exists():
            raise NotFoundError(f"no directory {text}", hint="give a model directory, or a hub id owner/name")
        path = path.resolve()
        return _Model(text, None, path, recipes.find(f"{path.parent.name}/{path.name}", where))
    recipe = recipes.find(text.partition("@")[0], where)
    if recipe is None:
        if "/" not in text:
            raise UsageError(f"{text!r} is no hub id, directory or recipe", hint="a hub id looks like owner/name")
        return _Model(text, refs.parse(text, request.revision), None, None)
    revision = request.revision or text.partition("@")[2] or recipe.revision
    return _Model(text, refs.parse(recipe.model, revision), None, recipe)


def _name_of(title: str) -> str:
    base = title.rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", base).strip("-._")[:63] or "llm"


def _check_exposure(host: str, settings: Settings, insecure: bool) -> None:
    if insecure or _is_loopback(host) or _has_key(settings):
        return
    raise UsageError(
        f"{host} can be reached from other machines, and no API key is set",
        hint="export MDEPLOY_API_KEY=…, or keep --host 127.0.0.1, or say --insecure",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _has_key(settings: Settings) -> bool:
    key = settings.get("api_key")
    if key and not re.fullmatch(r"[!-~]+", key):
        raise UsageError("the API key must be printable ASCII without blanks", hint="set MDEPLOY_API_KEY to another")
    return bool(key)


def _has_gpu() -> bool:
    return bool(gpus.probe())


def _asked_port(settings: Settings, flag: int | None) -> int | None:
    text = settings.get("port")
    try:
        port = flag if flag is not None else int(text) if text else None
    except ValueError as error:
        raise ConfigError(f"port {text!r} is no number", hint="set MDEPLOY_PORT to one") from error
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"--port {port}: between 1 and 65535")
    return port


def _free_port(paths: Paths, name: str, host: str) -> int:
    """The first port from 8000 that can be bound and that no other service has, running or stopped.

    Raises ConfigError where the address is not ours, or all are taken.
    """
    taken = {s.spec.port for s in state.listing(paths) if s.spec.name != name}
    problem = ConfigError(f"ports {FIRST_PORT} to {FIRST_PORT + _PORTS - 1} belong to services", hint="name a --port")
    for port in range(FIRST_PORT, FIRST_PORT + _PORTS):
        if port not in taken:
            try:
                check_port(host, port)
                return port
            except ConfigError as error:
                problem = error
    raise problem


@contextlib.contextmanager
def _ports_locked(paths: Paths) -> Iterator[None]:
    """One process at a time chooses a port and writes it down: engines bind theirs seconds later."""
    state.make_private(paths.services)
    with (paths.services / ".ports").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _local(settings: Settings, model: _Model, dry_run: bool, progress: Progress | None, say: Say) -> Path:
    if model.directory is not None:
        return model.directory
    from mdeploy.hub import store

    assert model.ref is not None
    cache = expand(settings.require("cache_dir"))
    found = store.locate(model.ref, cache)
    if found is not None:
        return found
    if dry_run:
        say(f"{model.ref} is not downloaded yet; a real run would fetch it first")
        return store.snapshot_dir(model.ref, cache)
    say(f"{model.ref} is not here yet: downloading")
    return Path(download(settings, model.ref, progress=progress).path)


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


def _plan(engine: Engine, known: ModelFacts, wish: LlmOptions, recipe: Recipe | None) -> GpuPlan:
    if engine.variant == "cuda":
        allowed = gpus.visible(gpus.probe(), None if wish.gpus else os.environ.get("CUDA_VISIBLE_DEVICES"))
        return plan.plan_cuda(known, wish, recipe, allowed)
    import psutil

    cores = len(os.sched_getaffinity(0))
    return plan.plan_cpu(known, wish, recipe, cores, psutil.virtual_memory().available)


def _spec(
    settings: Settings,
    name: str,
    model: _Model,
    argv: tuple[str, ...],
    chosen: GpuPlan,
    host: str,
    port: int,
    start_timeout_s: float | None,
) -> ServiceSpec:
    has_key = _has_key(settings)
    body = {"model": name, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
    return ServiceSpec(
        name=name,
        kind="llm",
        argv=argv,
        env={**command.environment(chosen), **(model.recipe.env if model.recipe else {})},
        cwd=str(settings.paths.service(name)),
        host=host,
        port=port,
        probe=Probe("/health", "/v1/completions", body, bearer=KEY_VARIABLE if has_key else None),
        model=name if model.title.startswith("-") else model.title,
        source=model.source,
        plan=chosen,
        secrets={KEY_VARIABLE: str(_secret(settings.paths, name))} if has_key else {},
        limits=Limits() if start_timeout_s is None else Limits(start_timeout_s=start_timeout_s),
    )


def _secret(paths: Paths, name: str) -> Path:
    return paths.secrets / f"{name}.api-key"


def _save(settings: Settings, files: ServiceFiles, spec: ServiceSpec) -> None:
    """Write a spec and its key down, so that `mdeploy run NAME` has all it needs; never under a running service."""
    key, secret = settings.get("api_key"), _secret(settings.paths, spec.name)
    with files.locked():
        if key:
            state.make_private(secret.parent)
            state.write_atomically(secret, key.encode())
        else:
            secret.unlink(missing_ok=True)
        files.write_spec(spec)
