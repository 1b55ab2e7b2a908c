"""The use-cases: what joins settings, hub, engines, planner and supervisor. No other module knows them all."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mdeploy import gpus, recipes
from mdeploy.bench.types import BenchTarget
from mdeploy.engines import install as engine_install
from mdeploy.engines import store as engine_store
from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UsageError
from mdeploy.llm import command, facts, log, plan
from mdeploy.paths import Paths
from mdeploy.settings import Settings
from mdeploy.specs import (
    Diagnosis,
    Engine,
    GpuPlan,
    Limits,
    LlmOptions,
    LocalModel,
    Manager,
    ModelFacts,
    ModelRef,
    Probe,
    Recipe,
    ServiceSpec,
    ServiceStatus,
)
from mdeploy.supervise import control, state
from mdeploy.supervise.state import ServiceFiles
from mdeploy.supervise.supervisor import Supervisor, Words, check_port

if TYPE_CHECKING:
    from mdeploy.hub.client import Progress

FIRST_PORT = 8000
_PORTS = 100
_KEY_VARIABLE = "VLLM_API_KEY"
_UNKNOWN_FACTS = ModelFacts("unknown", "auto", 0, None, None, None, None, None, chat_template=False)

Say = Callable[[str], None]


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


# engines


def install_engine(settings: Settings, variant: str, version: str | None, python: Path | None, say: Say) -> Engine:
    """Build an engine environment, or adopt the one of `python`."""
    root = settings.paths.engines
    if python is not None:
        if version is not None or variant != "auto":
            raise UsageError("--python takes the environment as it is", hint="leave out --version and --variant")
        return engine_store.adopt(root, python)
    if variant == "auto":
        variant = "cuda" if gpus.answers() else "cpu"
        say(f"variant {variant}: nvidia-smi {'lists a GPU' if variant == 'cuda' else 'lists no GPU'}")
    return engine_install.install(root, variant, version, say)


def list_engines(settings: Settings) -> tuple[Engine, ...]:
    """All engines of this home."""
    return engine_store.listing(settings.paths.engines)


def remove_engine(settings: Settings, name: str) -> Engine:
    """Remove an engine no running service uses."""
    engine = next((e for e in engine_store.listing(settings.paths.engines) if e.name == name), None)
    users = [s.spec.name for s in list_services(settings) if engine and s.pid and s.spec.argv[0] == engine.python]
    if users:
        raise MdeployError(f"engine {name} is in use by {', '.join(users)}", hint=f"mdeploy stop {' '.join(users)}")
    return engine_store.remove(settings.paths.engines, name)


# serve


def prepare_llm(
    settings: Settings, request: LlmRequest, *, dry_run: bool, progress: Progress | None, say: Say
) -> ServiceSpec:
    """Everything between a command line and a spec: look up, check, download, plan, render.

    What is quick to refuse is refused before a download. With `dry_run` nothing is fetched or
    written, and a model that is not there is planned without its facts.
    """
    model = _understand(settings, request)
    name = state.check_name(request.name or _name_of(model.title))
    host = request.host or settings.require("host")
    _check_exposure(host, settings, request.insecure)
    engine = _engine(settings, request)
    command.check_extra(request.wish.extra, command.known_flags(engine.python), engine.version)
    files = ServiceFiles(settings.paths, name)
    if not dry_run and files.is_supervised():
        raise state.already_running(name)
    port = _port(settings, request.port, host, check=not dry_run)
    directory = _local(settings, model, dry_run, progress, say)
    known = facts.read(directory) if directory.exists() else _UNKNOWN_FACTS
    chosen = _plan(engine, known, request.wish, model.recipe)
    return _spec(settings.paths, name, model, directory, engine, chosen, request, host, port, _has_key(settings))


def _understand(settings: Settings, request: LlmRequest) -> _Model:
    from mdeploy.hub import refs

    text = request.model
    where = recipes.directories(settings.paths, Path.cwd())
    if text.endswith((".yaml", ".yml")):
        own = recipes.load(Path(text))
        return _Model(text, refs.parse(own.model, request.revision or own.revision), None, own)
    path = Path(text).expanduser()
    if text.startswith((".", "/", "~")) or path.is_dir():
        if not path.exists():
            raise NotFoundError(f"no directory {text}", hint="give a model directory, or a hub id owner/name")
        return _Model(text, None, path.resolve(), recipes.find(path.resolve().name, where))
    recipe = recipes.find(text, where)
    if recipe is None and "/" not in text:
        raise UsageError(f"{text!r} is no hub id, directory or recipe", hint="a hub id looks like owner/name")
    identity = recipe.model if recipe else text
    revision = request.revision or (recipe.revision if recipe else None)
    return _Model(text, refs.parse(identity, revision), None, recipe)


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
    return bool(settings.get("api_key"))


def _engine(settings: Settings, request: LlmRequest) -> Engine:
    wanted = request.engine or settings.get("engine")
    return engine_store.find(settings.paths.engines, wanted, prefer_cuda=gpus.answers())


def _port(settings: Settings, asked: int | None, host: str, *, check: bool) -> int:
    """The port asked for, which must be free, or else the first free one from 8000."""
    text = settings.get("port")
    try:
        port = asked if asked is not None else int(text) if text else None
    except ValueError as error:
        raise ConfigError(f"port {text!r} is no number", hint="set MDEPLOY_PORT to one") from error
    if port is not None:
        if not 0 < port < 65536:
            raise UsageError(f"--port {port}: between 1 and 65535")
        if check:
            check_port(host, port)
        return port
    free = next((p for p in range(FIRST_PORT, FIRST_PORT + _PORTS) if _is_free(host, p)), None)
    if free is None and check:
        check_port(host, FIRST_PORT)  # says why: most likely the address is not ours
    return free or FIRST_PORT


def _is_free(host: str, port: int) -> bool:
    try:
        check_port(host, port)
    except ConfigError:
        return False
    return True


def _local(settings: Settings, model: _Model, dry_run: bool, progress: Progress | None, say: Say) -> Path:
    if model.directory is not None:
        return model.directory
    from mdeploy.hub import store

    assert model.ref is not None
    cache = Path(settings.require("cache_dir")).expanduser().absolute()
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
        cache_dir=Path(settings.require("cache_dir")).expanduser().absolute(),
        local_dir=local_dir,
        endpoint=settings.require("endpoint"),
        token=settings.get("token"),
        progress=progress,
    )


def _plan(engine: Engine, known: ModelFacts, wish: LlmOptions, recipe: Recipe | None) -> GpuPlan:
    if engine.variant == "cuda":
        return plan.plan_cuda(known, wish, recipe, gpus.probe())
    import psutil

    cores = len(os.sched_getaffinity(0))
    return plan.plan_cpu(known, wish, recipe, cores, psutil.virtual_memory().available)


def _spec(
    paths: Paths,
    name: str,
    model: _Model,
    directory: Path,
    engine: Engine,
    chosen: GpuPlan,
    request: LlmRequest,
    host: str,
    port: int,
    has_key: bool,
) -> ServiceSpec:
    served = tuple(dict.fromkeys((model.title, name)))
    extra = (*(model.recipe.args if model.recipe else ()), *request.wish.extra)
    limits = Limits() if request.start_timeout_s is None else Limits(start_timeout_s=request.start_timeout_s)
    body = {"model": served[0], "prompt": "Hi", "max_tokens": 1, "temperature": 0}
    return ServiceSpec(
        name=name,
        kind="llm",
        argv=command.argv(engine, directory, served, host, port, chosen, extra),
        env={**command.environment(chosen), **(model.recipe.env if model.recipe else {})},
        cwd=str(paths.service(name)),
        host=host,
        port=port,
        probe=Probe("/health", "/v1/completions", body, bearer=_KEY_VARIABLE if has_key else None),
        model=served[0],
        source=model.source,
        plan=chosen,
        secrets={_KEY_VARIABLE: str(paths.secrets / f"{name}.api-key")} if has_key else {},
        limits=limits,
    )


def save(settings: Settings, spec: ServiceSpec) -> ServiceFiles:
    """Write a spec and its secrets down, so that `mdeploy run NAME` has all it needs."""
    files = ServiceFiles(settings.paths, spec.name)
    secret = settings.paths.secrets / f"{spec.name}.api-key"
    key = settings.get("api_key")
    if spec.secrets and key:
        secret.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        state.write_atomically(secret, key.encode())
    else:
        secret.unlink(missing_ok=True)
    files.write_spec(spec)
    return files


def run_service(settings: Settings, name: str, manager: Manager) -> int:
    """Be the supervisor of a service until it ends; the exit code says how it did."""
    files = ServiceFiles(settings.paths, name)
    spec = files.spec()

    def explain(lines: Sequence[str], status: int, was_ready: bool) -> Diagnosis:
        found = log.explain(lines, status, was_ready)
        return dataclasses.replace(found, hint=found.hint.replace("NAME", name))

    return Supervisor(spec, files, manager, Words(log.progress, explain)).run()


def launch(settings: Settings, name: str, on_progress: Callable[[ServiceStatus], None]) -> ServiceStatus:
    """Start a known service detached and wait until it has answered, or raise why it did not."""
    status = control.start_detached(ServiceFiles(settings.paths, name), on_progress)
    if status.phase == "ready":
        return status
    raise failure(status)


def failure(status: ServiceStatus) -> MdeployError:
    """A failed service as an error with the exit code its cause asks for."""
    cause = status.error or f"the service is {status.phase}"
    error = MdeployError(f"{status.spec.name}: {cause}", hint=status.hint or f"mdeploy logs {status.spec.name}")
    return _with_code(error, status.exit_code)


def _with_code(error: MdeployError, code: int) -> MdeployError:
    kinds = (c for c in MdeployError.__subclasses__() if c.exit_code == code)
    kind = next(kinds, MdeployError)
    return kind(error.message, hint=error.hint)


# look and stop


def list_services(settings: Settings) -> tuple[ServiceStatus, ...]:
    """The truth about every service, by name."""
    return state.listing(settings.paths)


def stop_service(settings: Settings, name: str) -> bool:
    """End a service; True where something was running. Raises NotFoundError for an unknown name."""
    return control.stop(ServiceFiles(settings.paths, name))


def files_of(settings: Settings, name: str) -> ServiceFiles:
    """Files of a service that exists. Raises NotFoundError."""
    files = ServiceFiles(settings.paths, name)
    files.spec()
    return files


# measure


def bench_target(settings: Settings, wanted: str | None) -> BenchTarget:
    """What `mdeploy bench [NAME|URL]` measures: a URL, a named service, or the only one that is ready."""
    if wanted and "://" in wanted:
        return BenchTarget(wanted, None, settings.get("api_key"))
    if wanted:
        return _target(state.status(files_of(settings, wanted)))
    ready = [status for status in list_services(settings) if status.phase == "ready"]
    if len(ready) == 1:
        return _target(ready[0])
    if ready:
        names = ", ".join(status.spec.name for status in ready)
        raise UsageError(f"several services are running: {names}", hint=f"mdeploy bench {ready[0].spec.name}")
    raise NotFoundError("no service is running", hint="mdeploy serve llm -d, or name a URL: mdeploy bench URL")


def _target(status: ServiceStatus) -> BenchTarget:
    spec = status.spec
    if status.phase != "ready":
        raise failure(status) if status.phase == "failed" else _not_ready(status)
    path = spec.secrets.get(_KEY_VARIABLE)
    key = Path(path).read_text().strip() if path else None
    return BenchTarget(spec.url, spec.model, key, spec.name)


def _not_ready(status: ServiceStatus) -> MdeployError:
    from mdeploy.errors import NotReadyError

    name = status.spec.name
    hint = f"mdeploy restart {name}" if status.phase == "stopped" else f"mdeploy logs {name} -f"
    return NotReadyError(f"{name} is {status.phase}", hint=hint)
