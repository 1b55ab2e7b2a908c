"""The API keys of services: add one, list them, replace them, take them away.

A service is never open that was to have a key, whatever fails or is killed in between: a key is
on the disk before the spec that asks for it, and goes after it. A service that must start again is
stopped, changed and started; where that start fails, what was before comes back.

Engines that read their keys again on SIGHUP may have several; the first of the file is the one
that probes and `mdeploy bench` use. vLLM takes one, and takes another by starting again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mdeploy import credentials, prepare, services
from mdeploy.errors import ConfigError, MdeployError, NotReadyError, UsageError
from mdeploy.settings import Settings
from mdeploy.specs import ServiceSpec, ServiceStatus
from mdeploy.supervise import processes, state
from mdeploy.supervise.state import ServiceFiles

OnProgress = Callable[[ServiceStatus], None]
Effect = Literal["restarted", "reloaded", "at the next start"]

_LONGEST = 1024
_RELOAD_S, _POLL_S = 30.0, 0.1


@dataclass(frozen=True, slots=True)
class ServiceKeys:
    """What may be told of the keys of a service.

    `required` without a fingerprint is a key file that is gone. `since` is the Unix time of the last change.
    """

    service: str
    required: bool
    fingerprints: tuple[str, ...]
    since: float | None


@dataclass(frozen=True, slots=True)
class Change:
    """A change that was made: `key` is the new one, None where keys were only removed; `keys` are there now."""

    service: str
    key: str | None = field(repr=False)
    keys: int
    effect: Effect


@dataclass(frozen=True, slots=True)
class _Setup:
    """A spec together with its keys: what a change goes from and to."""

    spec: ServiceSpec
    keys: tuple[str, ...] = field(repr=False)


def check(text: str) -> str:
    """A key from outside. Raises UsageError, which does not say it."""
    try:
        key = credentials.check_key(text)
    except UsageError as error:
        raise UsageError(error.message, hint="leave out --stdin, and one is made") from error
    if len(key) > _LONGEST:
        raise UsageError(f"the API key has more than {_LONGEST} characters", hint="leave out --stdin, and one is made")
    return key


def listing(settings: Settings, name: str | None) -> tuple[ServiceKeys, ...]:
    """The keys of one service, or of all. Raises NotFoundError for an unknown name."""
    names = state.names(settings.paths) if name is None else (services.files_of(settings, name).name,)
    return tuple(_listed(settings, each) for each in names)


def _listed(settings: Settings, name: str) -> ServiceKeys:
    setup = _setup(settings, name)
    prints = tuple(credentials.fingerprint(key) for key in setup.keys)
    since = _file(settings, setup.spec).stat().st_mtime if prints else None
    return ServiceKeys(name, _variable(setup.spec) in setup.spec.secrets, prints, since)


def add(settings: Settings, name: str, key: str | None, on_progress: OnProgress) -> Change:
    """Give a service a key: its first, or one more where it can have several. Without `key` one is made.

    A running service that had none is started again with it. Raises UsageError where vLLM has one already.
    """
    with _alone(settings, name):
        before = _setup(settings, name)
        if before.keys and not before.spec.reloads:
            hint = f"mdeploy keys rotate {name}"
            raise UsageError(f"{name} has a key, and its engine takes no second one", hint=hint)
        new = _fresh(before, key)
        after = _Setup(_asking(settings, before.spec), (new, *before.keys))
        return Change(name, new, len(after.keys), _apply(settings, before, after, on_progress))


def rotate(settings: Settings, name: str, key: str | None, on_progress: OnProgress, *, restart: bool = True) -> Change:
    """Replace all keys of a service by one new one; afterwards only that one opens it.

    A running service takes it over by a restart, or without one where it reloads. Without `restart`
    it goes on with the old one until it is started the next time.
    """
    with _alone(settings, name):
        before = _setup(settings, name)
        if not before.keys:
            raise UsageError(f"{name} has no key", hint=f"mdeploy keys add {name}")
        new = _fresh(before, key)
        after = _Setup(before.spec, (new,))
        if not restart:
            _write(settings, after)
            return Change(name, new, len(after.keys), "at the next start")
        return Change(name, new, len(after.keys), _apply(settings, before, after, on_progress))


def remove(settings: Settings, name: str, on_progress: OnProgress, *, old: bool = False) -> Change:
    """Open a service to everybody who reaches it; with `old` only take away all keys but the newest.

    Raises UsageError where that would open it to other machines.
    """
    with _alone(settings, name):
        before = _setup(settings, name)
        if len(before.keys) < (2 if old else 1):
            raise UsageError(f"{name} has no {'older ' if old else ''}key", hint=f"mdeploy keys ls {name}")
        after = _Setup(before.spec, before.keys[:1]) if old else _Setup(_open(before.spec), ())
        return Change(name, None, len(after.keys), _apply(settings, before, after, on_progress))


# what there is


@contextlib.contextmanager
def _alone(settings: Settings, name: str) -> Iterator[None]:
    """One change at a time: of two new keys one would be void as soon as it is printed."""
    files, directory = services.files_of(settings, name), settings.paths.secrets
    state.make_private(directory)
    with _private(directory / f".{files.name}.lock"), (directory / f".{files.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MdeployError(f"another command changes the keys of {name}", hint="wait for it to end") from error
        yield


@contextlib.contextmanager
def _private(path: Path) -> Iterator[None]:
    """A key file that is not ours to read or write is told as such."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror}", hint="as its owner: sudo mdeploy …") from error


def _setup(settings: Settings, name: str) -> _Setup:
    spec = services.files_of(settings, name).spec()
    file = _file(settings, spec)
    if _variable(spec) not in spec.secrets:
        return _Setup(spec, ())
    with _private(file):
        try:
            keys = tuple(dict.fromkeys(file.read_text(encoding="ascii", errors="replace").split()))
        except FileNotFoundError:  # the service does not start without it; `rotate` and `add` mend that
            keys = ()
    return _Setup(spec, keys)


def _variable(spec: ServiceSpec) -> str:
    return spec.probe.bearer or credentials.KEY_VARIABLE


def _file(settings: Settings, spec: ServiceSpec) -> Path:
    known = spec.secrets.get(_variable(spec))
    return Path(known) if known else credentials.key_file(settings.paths, spec.name)


def _fresh(before: _Setup, key: str | None) -> str:
    if key is not None and key in before.keys:
        raise UsageError(f"{before.spec.name} has this key already", hint="leave out --stdin, and a new one is made")
    return key or credentials.new_key()


def _asking(settings: Settings, spec: ServiceSpec) -> ServiceSpec:
    """The spec of a service that asks for its key."""
    secrets = {**spec.secrets, _variable(spec): str(_file(settings, spec))}
    probe = dataclasses.replace(spec.probe, bearer=_variable(spec))
    return dataclasses.replace(spec, secrets=secrets, probe=probe)


def _open(spec: ServiceSpec) -> ServiceSpec:
    """The spec of a service that asks for nothing."""
    if not prepare.is_loopback(spec.host):
        raise UsageError(
            f"{spec.name} listens on {spec.host}: without a key every machine that reaches it could use it",
            hint=f"mdeploy keys rotate {spec.name}, or serve it again with --insecure",
        )
    secrets = {name: file for name, file in spec.secrets.items() if name != _variable(spec)}
    return dataclasses.replace(spec, secrets=secrets, probe=dataclasses.replace(spec.probe, bearer=None))


# changing it


def _write(settings: Settings, setup: _Setup) -> None:
    """Bring keys and spec to the disk, each whole, in the order that leaves no gate open."""
    file, files = _file(settings, setup.spec), ServiceFiles(settings.paths, setup.spec.name)
    if setup.keys:
        with _private(file):
            state.write_atomically(file, "".join(f"{key}\n" for key in setup.keys).encode())
    if files.spec() != setup.spec:
        with files.locked():
            files.write_spec(setup.spec)
    if not setup.keys:
        with _private(file):
            file.unlink(missing_ok=True)


def _apply(settings: Settings, before: _Setup, after: _Setup, on_progress: OnProgress) -> Effect:
    """Go from one setup to the other, a running service included; back again where it does not start."""
    files = ServiceFiles(settings.paths, before.spec.name)
    if not files.is_supervised():
        _write(settings, after)
        return "at the next start"
    same_spec, record = before.spec == after.spec, files.record()
    can_reload = same_spec and after.spec.reloads and record is not None and record.manager != "systemd"
    take_over = _reload if can_reload else _restart
    try:
        take_over(settings, after, on_progress)
    except MdeployError as error:
        raise _back(before, error, lambda: take_over(settings, before, on_progress)) from error
    except BaseException:  # interrupted: nobody has seen the new key
        _write(settings, before)
        if can_reload:
            _hang_up(files)
        raise
    return "reloaded" if can_reload else "restarted"


def _restart(settings: Settings, setup: _Setup, on_progress: OnProgress) -> None:
    services.stop_service(settings, setup.spec.name)
    _write(settings, setup)
    services.launch(settings, setup.spec.name, on_progress)


def _reload(settings: Settings, setup: _Setup, on_progress: OnProgress) -> None:
    """Have the engine read its keys again and wait until the first of them is let in. Raises NotReadyError."""
    _write(settings, setup)
    _hang_up(ServiceFiles(settings.paths, setup.spec.name))
    deadline, seen = time.monotonic() + _RELOAD_S, _ask(setup)
    while seen:
        if time.monotonic() > deadline:
            raise NotReadyError(f"{setup.spec.name} does not take the key: {seen}")
        time.sleep(_POLL_S)
        seen = _ask(setup)


def _hang_up(files: ServiceFiles) -> None:
    record = files.record()
    if record is not None and processes.is_same(record.pid, record.pid_created):
        processes.send([record.pid], signal.SIGHUP)


def _ask(setup: _Setup) -> str:
    """What goes wrong with a request that bears the first key; empty where it is answered."""
    from mdeploy.supervise.health import HttpProber

    def headers() -> Mapping[str, str]:
        return {"Authorization": f"Bearer {setup.keys[0]}"}

    spec = setup.spec
    answer = HttpProber(spec.url, spec.probe, spec.limits.health_timeout_s, headers).answers(spec.probe.timeout_s)
    return "" if answer.ok else answer.detail


def _back(before: _Setup, cause: MdeployError, again: Callable[[], None]) -> MdeployError:
    """Put the old state back and tell how that went; the error keeps the kind of its cause."""
    name = before.spec.name
    what = "the old key is back" if before.keys else "it has no key, as before"
    try:
        again()
    except MdeployError as error:
        text = f"{cause.message}; {what}, and it does not start with that either: {error.message}"
        return type(cause)(text, hint=error.hint or f"mdeploy logs {name}")
    return type(cause)(f"{cause.message}; {what} and {name} runs with that", hint=f"mdeploy logs {name}")
