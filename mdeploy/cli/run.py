"""`mdeploy run NAME`: supervise one service; what `serve`, `-d` and systemd all start."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class ManagedBy(str, Enum):
    """Who started the supervisor."""

    foreground = "foreground"
    detached = "detached"
    systemd = "systemd"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    name: Annotated[str, typer.Argument(help="A service that was served before.")],
    manager: Annotated[ManagedBy, typer.Option("--manager", hidden=True)] = ManagedBy.foreground,
    resumed: Annotated[bool, typer.Option("--resumed", hidden=True)] = False,
) -> int:
    """Supervise one service until it ends.

    Starts it, watches it, starts it again when it ends unasked, and stops it cleanly on Ctrl-C or
    SIGTERM. The same process runs a service in the foreground, in the background and under systemd.
    """
    from mdeploy import services, settings

    return services.run_service(settings.load(), name, manager.value, resumed=resumed)
