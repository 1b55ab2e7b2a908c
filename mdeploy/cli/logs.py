"""`mdeploy logs`: what an engine printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mdeploy.errors import ExitCode

_LINES = 100


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("logs")(logs)


def logs(
    name: Annotated[str, typer.Argument(help="Service, as `mdeploy ps` names it.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing as it is written.")] = False,
    lines: Annotated[
        int | None, typer.Option("-n", "--lines", min=0, help=f"Lines from the end. [default: {_LINES}; --since: all]")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Written since: 10m, 2h, '2026-11-21 13:00'.")
    ] = None,
    grep: Annotated[
        str | None, typer.Option("--grep", metavar="REGEX", help="Only lines that match (Python's syntax).")
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("-t", "--timestamps", help="Show when each line was written (UTC).")
    ] = False,
) -> None:
    """Print a service's log; -f follows it.

    Reads on across rotations, and ends when the service does. --since and
    --grep look into the rotated files too; -n counts what they leave. A date
    is in local time unless an offset says otherwise.
    """
    import time

    from mdeploy import servicelog, services, settings
    from mdeploy.supervise import tail

    count = _LINES if lines is None and since is None else lines
    query = tail.Query(
        count,
        None if since is None else tail.parse_since(since, time.time()),
        None if grep is None else tail.compile_pattern(grep),
    )
    files = services.files_of(settings.load(), name)
    try:
        for batch in servicelog.read(files, query, follow=follow):
            shown = batch if timestamps else [tail.split(line)[1] for line in batch]
            sys.stdout.buffer.writelines(line + b"\n" for line in shown)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:  # how a follower is left: nothing went wrong
        raise typer.Exit(ExitCode.INTERRUPTED) from None
