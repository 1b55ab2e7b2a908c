"""`mdeploy stop` and `mdeploy restart`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import options, output
from mdeploy.errors import MdeployError, UsageError

if TYPE_CHECKING:
    from mdeploy.specs import ServiceStatus

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Services, as `mdeploy ps` names them.")]
All = Annotated[bool, typer.Option("--all", help="Every service.")]


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("stop")(stop)
    app.command("restart")(restart)


def stop(names: Names = None, everything: All = False) -> None:
    """Stop services; nothing of them stays.

    No process, no port, no shared memory. Stopping what does not run is no error. A service that is
    installed as a unit starts again at the next boot.
    """
    from mdeploy import services, settings

    loaded = settings.load()

    def one(name: str) -> None:
        was_running = services.stop_service(loaded, name)
        output.say(f"{name} stopped" if was_running else f"{name} was not running")
        if services.starts_at_boot(loaded, name):
            output.say(f"it starts again at the next boot; to change that: mdeploy uninstall-systemd {name}")

    def everyone() -> list[str]:
        """The machine's part of a cluster goes last: services take their replicas away through it."""
        found = services.list_services(loaded)
        return [s.spec.name for s in sorted(found, key=lambda s: s.spec.kind == "cluster")]

    _each(_chosen(names, everything, everyone), one)


def restart(
    names: Names = None,
    everything: All = False,
    hard: Annotated[bool, typer.Option("--hard", help="Stop and start also what could go on serving.")] = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Restart services; an app goes on serving meanwhile.

    An app that is ready replaces its workers one after the other, each before it retires: new code is
    taken over without a lost request. Where a new worker does not start, the old ones go on. Other
    services, and all with --hard, are stopped and started as they were, in the background or under
    systemd.
    """
    from mdeploy import services, settings
    from mdeploy.cli.launching import Progress
    from mdeploy.cli.ps import row

    loaded = settings.load()
    started: list[ServiceStatus] = []

    def one(name: str) -> None:
        started.append(services.restart_service(loaded, name, Progress(), output.say, hard=hard))
        spec = started[-1].spec
        output.say(f"{name} is ready: {spec.url}{'' if spec.kind in ('app', 'cluster') else '/v1'}")

    def running() -> list[str]:
        return [s.spec.name for s in services.list_services(loaded) if s.phase != "stopped"]

    _each(_chosen(names, everything, running), one)
    output.emit({"services": [row(s) for s in started]}, as_json=as_json, human=str)


def _each(names: list[str], action: Callable[[str], None]) -> None:
    """Do it for every name; the first failure is raised once all have had their turn."""
    failures: list[MdeployError] = []
    for name in names:
        try:
            action(name)
        except MdeployError as error:
            failures.append(error)
    for other in failures[1:]:
        output.say(f"error: {other.message}")
    if failures:
        raise failures[0]


def _chosen(names: list[str] | None, everything: bool, all_names: Callable[[], list[str]]) -> list[str]:
    if everything == bool(names):
        raise UsageError("name services, or say --all", hint="mdeploy ps lists them")
    return all_names() if everything else list(dict.fromkeys(names or []))
