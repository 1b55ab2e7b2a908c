"""The use-cases: what joins settings, hub, engines, planner and supervisor. No other module knows them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mdeploy import dispatch, gpus, reservations, rolling
from mdeploy.bench.types import BenchTarget
from mdeploy.engines import install as engine_install
from mdeploy.engines import store as engine_store
from mdeploy.errors import (
    AlreadyRunningError,
    ConfigError,
    DoesNotFitError,
    ExitCode,
    MdeployError,
    NotFoundError,
    NotReadyError,
    UsageError,
)
from mdeploy.llm import log as vllm_log
from mdeploy.serving import log as app_log
from mdeploy.settings import Settings
from mdeploy.specs import Diagnosis, Engine, Manager, Say, ServiceSpec, ServiceStatus
from mdeploy.supervise import control, state
from mdeploy.supervise.causes import Words
from mdeploy.supervise.guard import Guard
from mdeploy.supervise.secrets import first_key
from mdeploy.supervise.state import ServiceFiles
from mdeploy.supervise.supervisor import Supervisor
from mdeploy.supervise.world import Machine
from mdeploy.systemd import manager as units

_APP_WORDS = Words(app_log.progress, app_log.explain)
_VLLM_WORDS = Words(vllm_log.progress, vllm_log.explain)

# engines


def install_engine(settings: Settings, variant: str, version: str | None, python: Path | None, say: Say) -> Engine:
    """Build an engine environment, or adopt the one of `python`."""
    root = settings.paths.engines
    if python is not None:
        if version is not None or variant != "auto":
            raise UsageError("--python takes the environment as it is", hint="leave out --version and --variant")
        return engine_store.adopt(root, python)
    if variant == "auto":
        variant = "cuda" if gpus.probe() else "cpu"
        say(f"variant {variant}: nvidia-smi {'lists a GPU' if variant == 'cuda' else 'lists no GPU'}")
    name = engine_install.name_of(variant, version)
    present = next((engine for engine in engine_store.listing(root) if engine.name == name), None)
    if present is not None:
        say(f"{name} is already installed; to make it anew: mdeploy engines rm {name}")
        return present
    return engine_install.install(root, variant, version, say)


def list_engines(settings: Settings) -> tuple[Engine, ...]:
    """All engines of this home."""
    return engine_store.listing(settings.paths.engines)


def remove_engine(settings: Settings, name: str) -> Engine:
    """Remove an engine no running service uses."""
    root = settings.paths.engines
    own = str(root / name / "bin" / "python")
    users = [s.spec.name for s in list_services(settings) if s.pid and s.spec.argv[:1] == (own,)]
    if users:
        raise MdeployError(f"engine {name} is in use by {', '.join(users)}", hint=f"mdeploy stop {' '.join(users)}")
    return engine_store.remove(root, name)


# run


def run_service(settings: Settings, name: str, manager: Manager, *, resumed: bool) -> int:
    """Be the supervisor of a service until it ends; the exit code says how it did.

    `resumed` takes the place of a supervisor that was killed. Raises ConfigError for an installed unit
    that somebody else than systemd wants to run: it could not write to its own files afterwards.
    """
    files = ServiceFiles(settings.paths, name)
    spec = files.spec()
    if manager != "systemd" and starts_at_boot(settings, name):
        hint = f"mdeploy restart {name}, or mdeploy uninstall-systemd {name} first"
        raise ConfigError(f"{name} is a unit, systemd runs it", hint=hint)

    words = _VLLM_WORDS if spec.is_vllm else _APP_WORDS

    def explain(lines: Sequence[str], status: int, was_ready: bool) -> Diagnosis:
        found = words.explain(lines, status, was_ready)
        return dataclasses.replace(found, hint=found.hint.replace("NAME", name))

    world = Machine(spec, files, manager, lambda: _free_mib(settings, spec))
    command, env = control.run_command(files)
    # systemd is the guard of its own services
    guard = None
    if manager != "systemd":
        again = [*command, "--manager", manager, "--resumed"]
        guard = Guard(again, env, wakes=manager == "detached")
    try:
        return Supervisor(spec, files, manager, Words(words.progress, explain), world, guard, resumed=resumed).run()
    finally:
        world.close()


def _free_mib(settings: Settings, spec: ServiceSpec) -> dict[int, int]:
    """Free memory of the GPUs a service has to itself; what the driver will not tell is left out."""
    if spec.plan is None or spec.plan.device != "cuda":
        return {}
    others = (s.spec.plan for s in state.listing(settings.paths) if s.spec.name != spec.name and s.pid)
    shared = {index for plan in others if plan for index in plan.indices}
    try:
        own = set(spec.plan.indices) - shared
        return {gpu.index: gpu.free_mib for gpu in gpus.probe() if gpu.index in own}
    except DoesNotFitError:  # a broken driver is the engine's to report, in its own words
        return {}


def launch(settings: Settings, name: str, on_progress: Callable[[ServiceStatus], None]) -> ServiceStatus:
    """Start a known service in the background and wait until it has answered, or raise why it did not."""
    files = ServiceFiles(settings.paths, name)
    with reservations.starting(settings.paths, files.spec()):
        status = dispatch.start(files, on_progress)
    if status.phase == "ready":
        return status
    raise failure(status)


def failure(status: ServiceStatus) -> MdeployError:
    """A failed service as an error with the exit code its cause asks for."""
    cause = status.error or f"the service is {status.phase}"
    error = MdeployError(f"{status.spec.name}: {cause}", hint=status.hint or f"mdeploy logs {status.spec.name}")
    return _with_code(error, status.exit_code)


def _with_code(error: MdeployError, code: int) -> MdeployError:
    kinds = (c for c in MdeployError.__subclasses__() if c.exit_code == code != ExitCode.FAILURE)
    kind = next(kinds, MdeployError)
    return kind(error.message, hint=error.hint)


# look and stop


def list_services(settings: Settings) -> tuple[ServiceStatus, ...]:
    """The truth about every service, by name."""
    return dispatch.listing(settings.paths)


def restart_service(
    settings: Settings, name: str, on_progress: Callable[[ServiceStatus], None], say: Say, *, hard: bool = False
) -> ServiceStatus:
    """Restart a service: an app that serves replaces its workers one by one, anything else ends and starts again.

    `hard` ends and starts any. Raises what keeps it from being ready again.
    """
    files = ServiceFiles(settings.paths, name)
    files.spec()
    if not hard and rolling.can(state.status(files)):
        return rolling.restart(files, say)
    return _stop_and_start(settings, files, on_progress)


def _stop_and_start(
    settings: Settings, files: ServiceFiles, on_progress: Callable[[ServiceStatus], None]
) -> ServiceStatus:
    """Nothing is ended that could not be started again for want of a spec or a disk.

    Where somebody else starts it at the same moment, theirs is the start that is waited for.
    """
    files.check_writable()
    dispatch.stop(files)
    try:
        return launch(settings, files.name, on_progress)
    except AlreadyRunningError:
        status = control.wait_settled(files, on_progress)
    if status.phase == "ready":
        return status
    raise failure(status)


def stop_service(settings: Settings, name: str) -> bool:
    """End a service; True where something was running. Raises NotFoundError for an unknown name."""
    return dispatch.stop(ServiceFiles(settings.paths, name))


def starts_at_boot(settings: Settings, name: str) -> bool:
    """True for a service that is installed as a unit."""
    return units.find(settings.paths.home, name) is not None


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
    ready = [s for s in list_services(settings) if s.phase == "ready" and s.spec.kind != "cluster"]
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
    path = spec.secrets.get(spec.probe.bearer or "")
    key = first_key(Path(path)) if path else None
    return BenchTarget(spec.url, spec.model, key, spec.name, spec.kind)


def _not_ready(status: ServiceStatus) -> MdeployError:
    name = status.spec.name
    hint = f"mdeploy restart {name}" if status.phase == "stopped" else f"mdeploy logs {name} -f"
    return NotReadyError(f"{name} is {status.phase}", hint=hint)
