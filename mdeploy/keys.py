"""The API keys of services: add one, list them, replace them, take them away.

A service is never open that was to have a key, whatever fails or is killed in between: a key is
on the disk before the spec that asks for it, and goes after it. A service that must start again is
stopped, changed and started; where that start fails or is interrupted, what was before comes back.
A unit gets its keys from systemd, which learns of a change at once: a boot asks nobody.

Engines that read their keys again on SIGHUP may have several; the first of the file is the one
that probes and `mdeploy bench` use. vLLM takes one, and takes another by starting again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mdeploy import credentials, dispatch, drafts, services
from mdeploy.errors import MdeployError, NotReadyError, UsageError
from mdeploy.settings import Settings
from mdeploy.specs import Say, ServiceSpec, ServiceStatus
from mdeploy.supervise import processes, state
from mdeploy.supervise.state import ServiceFiles

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
class Listener:
    """Who hears of a change while it is made: looks at a service that starts, and lines."""

    status: Callable[[ServiceStatus], None]
    say: Say


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


def add(settings: Settings, name: str, key: str | None, listener: Listener) -> Change:
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
        return Change(name, new, len(after.keys), _apply(settings, before, after, listener))


def rotate(settings: Settings, name: str, key: str | None, listener: Listener, *, restart: bool = True) -> Change:
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
            _write_for_later(settings, before, after)
            return Change(name, new, len(after.keys), "at the next start")
        return Change(name, new, len(after.keys), _apply(settings, before, after, listener))


def remove(settings: Settings, name: str, listener: Listener, *, old: bool = False) -> Change:
    """Open a service to everybody who reaches it; with `old` only take away all keys but the newest.

    Raises UsageError where that would open it to other machines.
    """
    with _alone(settings, name):
        before = _setup(settings, name)
        if len(before.keys) < (2 if old else 1):
            raise UsageError(f"{name} has no {'older ' if old else ''}key", hint=f"mdeploy keys ls {name}")
        after = _Setup(before.spec, before.keys[:1]) if old else _Setup(_open(before.spec), ())
        return Change(name, None, len(after.keys), _apply(settings, before, after, listener))


# what there is


@contextlib.contextmanager
def _alone(settings: Settings, name: str) -> Iterator[None]:
    """One change at a time, to a service that there is. Raises NotFoundError."""
    with credentials.locked(settings.paths, services.files_of(settings, name).name):
        yield


def _setup(settings: Settings, name: str) -> _Setup:
    spec = services.files_of(settings, name).spec()
    file = _file(settings, spec)
    if _variable(spec) not in spec.secrets:
        return _Setup(spec, ())
    with credentials.private(file):
        try:
            keys = tuple(dict.fromkeys(file.read_text(encoding="ascii", errors="replace").split()))
        except FileNotFoundError:  # the service does not start without it; `rotate` and `add` mend that
            keys = ()
    return _Setup(spec, keys)


def _variable(spec: ServiceSpec) -> str:
    return spec.probe.bearer or credentials.variable(of_vllm=spec.is_vllm)


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
    if not drafts.is_loopback(spec.host):
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
    _write_keys(file, setup.keys)
    if files.spec() != setup.spec:
        with files.locked():
            dispatch.write_spec(files, setup.spec)
    if not setup.keys:
        with credentials.private(file):
            file.unlink(missing_ok=True)


def _write_keys(file: Path, keys: tuple[str, ...]) -> None:
    if keys:
        with credentials.private(file):
            state.write_atomically(file, "".join(f"{key}\n" for key in keys).encode())


def _write_for_later(settings: Settings, before: _Setup, after: _Setup) -> None:
    """Change what a service starts with the next time, whole or not at all."""
    try:
        _write(settings, after)
    except BaseException:
        with _undisturbed():
            _write(settings, before)
        raise


def _apply(settings: Settings, before: _Setup, after: _Setup, listener: Listener) -> Effect:
    """Go from one setup to the other, a running service included; back again where it does not start."""
    files = ServiceFiles(settings.paths, before.spec.name)
    if not files.is_supervised():
        _write_for_later(settings, before, after)
        return "at the next start"
    files.check_writable()  # nothing is ended that could not be started again
    same_spec, record = before.spec == after.spec, files.record()
    # a unit's engine has a copy of its keys, which systemd made when it started
    can_reload = same_spec and after.spec.reloads and record is not None and record.manager != "systemd"
    take_over, undo = (_reload, _take_back) if can_reload else (_restart, _begin_as_before)
    with _interrupted(before, lambda: undo(settings, before), listener.say):
        try:
            take_over(settings, after, listener)
        except MdeployError as error:
            raise _back(before, error, lambda: take_over(settings, before, listener)) from error
    return "reloaded" if can_reload else "restarted"


@contextlib.contextmanager
def _interrupted(before: _Setup, undo: Callable[[], None], say: Say) -> Iterator[None]:
    """An interrupt puts back what was, and says so: nobody has seen the new key."""
    try:
        yield
    except MdeployError:
        raise
    except BaseException:
        name = before.spec.name
        with _undisturbed():
            say(f"{name}: the change is taken back, it goes on {'with its old key' if before.keys else 'as before'}")
            try:
                undo()
            except MdeployError as error:
                say(f"{name}: that failed, {error.message}; mdeploy restart {name} starts it anew")
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What is half taken back is worse than either end: a second Ctrl-C must wait.

    Handlers that do nothing, not SIG_IGN: what is started in here must not inherit it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _restart(settings: Settings, setup: _Setup, listener: Listener) -> None:
    services.stop_service(settings, setup.spec.name)
    _write(settings, setup)
    services.launch(settings, setup.spec.name, listener.status)


def _begin_as_before(settings: Settings, before: _Setup) -> None:
    """Start the service with what it had; the old key comes first, lest a stop that fails leaves the new one."""
    _write_keys(_file(settings, before.spec), before.keys)
    services.stop_service(settings, before.spec.name)
    _write(settings, before)
    dispatch.begin(ServiceFiles(settings.paths, before.spec.name))


def _take_back(settings: Settings, before: _Setup) -> None:
    """Have the engine read its old keys again."""
    _write(settings, before)
    _hang_up(ServiceFiles(settings.paths, before.spec.name))


def _reload(settings: Settings, setup: _Setup, listener: Listener) -> None:
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
    """Ask the supervisor to pass it on; in the foreground it means that the terminal is gone, so ask the engine."""
    record = files.record()
    if record is None or not processes.is_same(record.pid, record.pid_created):
        return
    if record.manager != "foreground":
        processes.send([record.pid], signal.SIGHUP)
    elif record.engine_pid and processes.is_marked(record.engine_pid, record.run_id):
        processes.send([record.engine_pid], signal.SIGHUP)


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
