"""`mdeploy stop` and `mdeploy restart`."""

from __future__ import annotations

from typing import Annotated

import typer

from mdeploy.cli import options, output
from mdeploy.errors import UsageError

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Services, as `mdeploy ps` names them.")]
All = Annotated[bool, typer.Option("--all", help="Every service.")]


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("stop")(stop)
    app.command("restart")(restart)


def stop(names: Names = None, everything: All = False) -> None:
    """Stop services; nothing of them stays.

    No process, no port, no shared memory. Stopping what does not run is no error.
    """
    from mdeploy import services, settings

    loaded = settings.load()
    for name in _chosen(names, everything, [s.spec.name for s in services.list_services(loaded)]):
        was_running = services.stop_service(loaded, name)
        output.say(f"{name} stopped" if was_running else f"{name} was not running")


def restart(names: Names = None, everything: All = False, as_json: options.JsonFlag = False) -> None:
    """Stop services and start them again.

    They start as they were, in the background.
    """
    from mdeploy import services, settings
    from mdeploy.cli.ps import row
    from mdeploy.cli.serve import Progress

    loaded = settings.load()
    running = [s.spec.name for s in services.list_services(loaded) if s.phase != "stopped"]
    started = []
    for name in _chosen(names, everything, running):
        services.stop_service(loaded, name)
        started.append(services.launch(loaded, name, Progress()))
        output.say(f"{name} is ready: {started[-1].spec.url}/v1")
    output.emit({"services": [row(s) for s in started]}, as_json=as_json, human=str)


def _chosen(names: list[str] | None, everything: bool, all_names: list[str]) -> list[str]:
    if everything == bool(names):
        raise UsageError("name services, or say --all", hint="mdeploy ps lists them")
    return all_names if everything else list(dict.fromkeys(names or []))
