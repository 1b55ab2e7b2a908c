"""`mdeploy logs`: what an engine printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("logs")(logs)


def logs(
    name: Annotated[str, typer.Argument(help="Service, as `mdeploy ps` names it.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing as it is written.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines from the end.")] = 100,
) -> None:
    """Print a service's log; -f follows it.

    Reads on across rotations, and ends when the service does.
    """
    from mdeploy import services, settings
    from mdeploy.supervise import logs as log_files

    files = services.files_of(settings.load(), name)
    for chunk in log_files.read(files.log, lines, files.is_supervised if follow else None):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
