"""Replacing the workers of an app that serves, each before it retires: no request is lost, no port is given up.

The app does it by itself at SIGUSR1 and tells in /health how far it is; here it is asked to, and watched.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdeploy.errors import ConfigError, MdeployError, NotReadyError
from mdeploy.specs import Say, ServiceRecord, ServiceSpec, ServiceStatus
from mdeploy.supervise import processes, state
from mdeploy.supervise.state import ServiceFiles

if TYPE_CHECKING:
    import httpx

_POLL_S = 0.2
_TAKEN_S = 20.0
"""How long an app may take to begin what a signal asks for."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look at /health: which workers there are, and how the replacement goes."""

    workers: frozenset[str]
    state: str
    error: str
    round: int

    def is_through(self, before: _Seen) -> bool:
        """Whether every worker was replaced."""
        return self.state == "idle" and bool(self.workers) and not self.workers & before.workers


def can(status: ServiceStatus) -> bool:
    """Whether a service replaces its workers while it serves; `unhealthy` it is also just after one has ended."""
    if status.spec.is_vllm or status.spec.kind in ("llm", "cluster"):
        return False
    return status.phase == "ready" or (status.phase == "unhealthy" and _is_live(status.spec))


def _is_live(spec: ServiceSpec) -> bool:
    """Whether every handler has a worker."""
    import httpx

    try:
        answer = httpx.get(f"{spec.url}{spec.probe.health_path}", trust_env=False, timeout=spec.limits.health_timeout_s)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK


def restart(files: ServiceFiles, say: Say) -> ServiceStatus:
    """Have every worker replaced and wait for it. Raises MdeployError where a new one does not start: the old go on."""
    import httpx

    spec = files.spec()
    with httpx.Client(base_url=spec.url, trust_env=False, timeout=spec.limits.health_timeout_s) as client:
        before = _look(client, spec)
        _ask(files)
        _watch(client, files, spec, before, say)
    return state.status(files)


def _ask(files: ServiceFiles) -> None:
    record = files.record()
    if record is None or not _is_running(record):
        raise NotReadyError(f"{files.name} does not run any more", hint=f"mdeploy restart {files.name} --hard")
    _signal(files, record)


def _is_running(record: ServiceRecord) -> bool:
    """Whether the engine's process is there, and is not another one that got its number."""
    return bool(record.engine_pid and record.run_id) and processes.is_marked(record.engine_pid or 0, record.run_id)


def _signal(files: ServiceFiles, record: ServiceRecord) -> None:
    """USR1 for the engine. Root acts for the user of a unit, and never signals anybody else's process for them."""
    pid = record.engine_pid or 0
    try:
        if Path(f"/proc/{pid}").stat().st_uid != (files.directory / "state.json").lstat().st_uid:
            raise ConfigError(f"the record of {files.name} names a process of another user")
        os.kill(pid, signal.SIGUSR1)
    except PermissionError as error:
        raise MdeployError(f"{files.name} belongs to another user", hint="sudo mdeploy …") from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotReadyError(f"{files.name} does not run any more", hint=f"mdeploy ps shows {files.name}") from error


def _watch(client: httpx.Client, files: ServiceFiles, spec: ServiceSpec, before: _Seen, say: Say) -> None:
    now = begun = time.monotonic()
    told, started = -1, False
    while now - begun < spec.limits.start_timeout_s:
        seen = _look(client, spec)
        fresh = len(seen.workers - before.workers)
        started = started or seen.round > before.round or fresh > 0
        if started and fresh != told:
            told = fresh
            say(f"  {now - begun:5.1f}s  {fresh} of {len(before.workers)} workers are new")
        if seen.is_through(before):
            return
        if seen.state == "failed" and started:
            hint = f"mdeploy logs {files.name}; the workers from before go on"
            raise MdeployError(f"{files.name}: a new worker did not start: {seen.error}", hint=hint)
        if not started and now - begun > _TAKEN_S:
            raise NotReadyError(f"{files.name} does not begin", hint=f"mdeploy restart {files.name} --hard")
        time.sleep(_POLL_S)
        now = time.monotonic()
    hint = f"mdeploy logs {files.name}; the workers from before go on"
    raise NotReadyError(f"{files.name}: not all workers are new after {now - begun:.0f} s", hint=hint)


def _look(client: httpx.Client, spec: ServiceSpec) -> _Seen:
    import httpx

    try:
        document = client.get(spec.probe.health_path).json()
    except (httpx.HTTPError, ValueError) as error:
        hint = f"mdeploy restart {spec.name} --hard"
        raise NotReadyError(f"{spec.name} does not say how it is: {error}", hint=hint) from error
    rolling: Mapping[str, Any] = document.get("rolling") or {}
    phase, cause, number = rolling.get("state", "idle"), rolling.get("error") or "", rolling.get("round") or 0
    return _Seen(_workers(document), str(phase), str(cause), int(number))


def _workers(document: Mapping[str, Any]) -> frozenset[str]:
    """Every worker that is not about to go, by names that no later one has."""
    handlers: Mapping[str, Any] = document.get("handlers") or {}
    found = ((name, one) for name, handler in handlers.items() for one in handler.get("workers", ()))
    return frozenset(f"{name} {w['pid']} {w['generation']}" for name, w in found if w["state"] != "retiring")
