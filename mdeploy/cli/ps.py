"""`mdeploy ps`: every service and what is true of it now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from mdeploy.cli import options, output

if TYPE_CHECKING:
    from mdeploy.specs import ServiceStatus


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ps")(ps)


def ps(as_json: options.JsonFlag = False) -> None:
    """List services and what is true of them.

    A phase is starting, ready, unhealthy, stopping, stopped or failed. Services that systemd runs for
    other homes are listed too, where you may see them.
    """
    from mdeploy import dispatch, settings

    paths = settings.load().paths
    found = (*dispatch.listing(paths), *dispatch.listing_of_others(paths))
    output.emit({"services": [row(s) for s in found]}, as_json=as_json, human=lambda: _table(found))


def row(status: ServiceStatus) -> dict[str, Any]:
    """One service as the JSON contract has it."""
    spec = status.spec
    return {
        "name": spec.name,
        "kind": spec.kind,
        "phase": status.phase,
        "pid": status.pid,
        "host": spec.host,
        "port": spec.port,
        "url": spec.url,
        "model": spec.model,
        "since": status.since,
        "restarts": status.restarts,
        "error": status.error,
        "manager": status.manager,
    }


def _table(found: tuple[ServiceStatus, ...]) -> str:
    if not found:
        return "no services; start one: mdeploy serve llm -d"
    import time

    now = time.time()
    rows = [(*_cells(s), output.human_seconds(max(0.0, now - s.since)), s.spec.url, s.spec.model) for s in found]
    notes = [f"{s.spec.name}: {s.error or s.detail}" for s in found if s.error or (s.phase != "ready" and s.detail)]
    return "\n".join([output.table(("NAME", "KIND", "PHASE", "MANAGER", "SINCE", "URL", "MODEL"), rows), *notes])


def _cells(status: ServiceStatus) -> tuple[str, str, str, str]:
    return (status.spec.name, status.spec.kind, status.phase, status.manager or "-")
