"""Which GPUs and ports are spoken for, so that two services are never planned onto the same ones.

They belong to a service that runs, that is installed as a unit (it comes back at boot) or that a
process is about to start. Such a process writes a claim down under one lock; the claim is worth
as much as the process: once it is gone, so is the claim.

    HOME/services/.planning          the lock: one process at a time chooses and writes down
    HOME/services/.claims/NAME       what is about to be started, and by which process
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdeploy.errors import ConfigError, DoesNotFitError, MdeployError, NotFoundError
from mdeploy.paths import Paths
from mdeploy.specs import ServiceSpec, from_json, to_json
from mdeploy.supervise import processes, state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.state import ServiceFiles
from mdeploy.systemd import manager

FIRST_PORT = 8000
_PORTS = 100


@dataclass(frozen=True, slots=True)
class Holder:
    """What one service has, and why nobody else gets it.

    `named` where its user chose the devices, `is_new` where it is yet to get them.
    """

    name: str
    why: str
    gpus: tuple[int, ...] = ()
    port: int | None = None
    memory: int = 0
    named: bool = False
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The services that a new one has to live beside."""

    holders: tuple[Holder, ...] = ()

    @property
    def gpus(self) -> Mapping[int, str]:
        """Whose each device is, in words."""
        return {index: f"{holder.name} ({holder.why})" for holder in reversed(self.holders) for index in holder.gpus}

    @property
    def ports(self) -> frozenset[int]:
        """Every port of theirs."""
        return frozenset(holder.port for holder in self.holders if holder.port)

    @property
    def memory(self) -> int:
        """Bytes of main memory that are planned for those not running yet."""
        return sum(holder.memory for holder in self.holders)

    def joined(self, more: Iterable[Holder]) -> Neighbours:
        """With more services beside them."""
        return Neighbours((*self.holders, *more))


@dataclass(frozen=True, slots=True)
class Claim:
    """A service that process `pid` is about to start; (pid, pid_created, boot_id) name it for ever."""

    name: str
    gpus: tuple[int, ...]
    port: int
    named: bool
    pid: int
    pid_created: float
    boot_id: str

    @property
    def lives(self) -> bool:
        """True while the process that made it is there."""
        return self.boot_id == processes.boot_id() and processes.is_same(self.pid, self.pid_created)


@contextlib.contextmanager
def locked(paths: Paths) -> Iterator[None]:
    """One process at a time plans and writes it down: engines take their GPUs and ports much later."""
    state.make_private(paths.services)
    with (paths.services / ".planning").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gpus_of(spec: ServiceSpec) -> tuple[int, ...]:
    """The devices a service was planned onto."""
    return spec.plan.indices if spec.plan and spec.plan.device == "cuda" else ()


def holder(spec: ServiceSpec, why: str, memory: int = 0) -> Holder:
    """A service as the others see it."""
    return Holder(spec.name, why, gpus_of(spec), spec.port, memory, bool(spec.plan and spec.plan.named))


def neighbours(paths: Paths, but: Collection[str] = ()) -> Neighbours:
    """What services of this home have, those named in `but` left out, and system services of other homes.

    A stopped service keeps its port, so that it can be started again, but not its GPUs.
    """
    claimed = (Holder(c.name, "being started", c.gpus, c.port, 0, c.named) for c in _claims(paths))
    here = (_of_home(paths, spec) for spec in _specs(paths))
    found = [one for one in (*here, *claimed) if one.name not in but]
    return Neighbours((*found, *(holder(spec, "a system service") for spec in _elsewhere(paths))))


def _of_home(paths: Paths, spec: ServiceSpec) -> Holder:
    if ServiceFiles(paths, spec.name).is_supervised():
        return holder(spec, "running")
    if manager.find(paths.home, spec.name):
        return holder(spec, "installed as a unit")
    return Holder(spec.name, "stopped", port=spec.port)


def _specs(paths: Paths) -> Iterator[ServiceSpec]:
    for name in state.names(paths):
        with contextlib.suppress(ConfigError, NotFoundError):  # damaged, or removed meanwhile
            yield ServiceFiles(paths, name).spec()


def _elsewhere(paths: Paths) -> Iterator[ServiceSpec]:
    """Units of the machine whose files lie in another home than ours and may be read."""
    for unit in manager.installed("system"):
        with contextlib.suppress(MdeployError, OSError):
            if unit.home != paths.home:
                yield ServiceFiles(Paths(unit.home), unit.service).spec()


# ports


def free_port(host: str, others: Neighbours) -> int:
    """The first port from 8000 that can be bound and that no other service has, running or stopped.

    Raises ConfigError where the address is not ours, or all are taken.
    """
    problem = ConfigError(f"ports {FIRST_PORT} to {FIRST_PORT + _PORTS - 1} belong to services", hint="name a --port")
    for port in range(FIRST_PORT, FIRST_PORT + _PORTS):
        if port not in others.ports:
            try:
                check_port(host, port)
                return port
            except ConfigError as error:
                problem = error
    raise problem


def can_listen(host: str, port: int) -> bool:
    """Whether an address can be listened on right now."""
    try:
        check_port(host, port)
    except ConfigError:
        return False
    return True


# claims


def claim(paths: Paths, spec: ServiceSpec) -> None:
    """Hold the GPUs and the port of a service until it runs or this process ends; call it under `locked`.

    Of two processes that start one service the later has the claim, whoever gets the service.
    """
    pid, seen = os.getpid(), holder(spec, "")
    made = Claim(spec.name, seen.gpus, spec.port, seen.named, pid, processes.created(pid) or 0.0, processes.boot_id())
    state.make_private(_claim(paths, spec.name).parent)
    state.write_atomically(_claim(paths, spec.name), to_json(made))


def release(paths: Paths, name: str) -> None:
    """Let go of what this process claimed for a service: it runs, or will not."""
    found = _read(_claim(paths, name))
    if found and found.pid == os.getpid():
        _claim(paths, name).unlink(missing_ok=True)


@contextlib.contextmanager
def starting(paths: Paths, spec: ServiceSpec) -> Iterator[None]:
    """Claim what a service was planned onto while it is being started.

    Raises DoesNotFitError where another service got its GPUs while it was stopped.
    """
    with locked(paths):
        check(spec, neighbours(paths, but=[spec.name]))
        claim(paths, spec)
    try:
        yield
    finally:
        release(paths, spec.name)


def check(spec: ServiceSpec, others: Neighbours) -> None:
    """Raise DoesNotFitError where a GPU that was chosen for `spec` was chosen for another service as well.

    Devices that a user named, for this service or for the other, are the user's business.
    """
    mine = holder(spec, "")
    planned = Neighbours(tuple(other for other in others.holders if not other.named)).gpus
    lost = [f"GPU {index} belongs to {planned[index]}" for index in mine.gpus if index in planned]
    if lost and not mine.named:
        hint = f"serve {spec.name} again to plan it anew, with --gpus to share one; or stop the other"
        raise DoesNotFitError(f"{spec.name}: {', '.join(lost)} by now", hint=hint)


def _claim(paths: Paths, name: str) -> Path:
    return paths.services / ".claims" / name


def _claims(paths: Paths) -> tuple[Claim, ...]:
    found = (_read(path) for path in sorted((paths.services / ".claims").glob("[!.]*")))
    return tuple(claim for claim in found if claim and claim.lives)


def _read(path: Path) -> Claim | None:
    try:
        return from_json(Claim, path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
