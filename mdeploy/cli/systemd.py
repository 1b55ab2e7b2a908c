"""`mdeploy install-systemd` and `mdeploy uninstall-systemd`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdeploy.cli import options, output
from mdeploy.errors import UsageError

if TYPE_CHECKING:
    from mdeploy.installation import Outcome, Preview
    from mdeploy.systemd.units import Scope

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Services, as `mdeploy ps` names them.")]
OwnUnits = Annotated[bool, typer.Option("--user", help="Units of your own account; needs no root, has no sandbox.")]


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("install-systemd")(install)
    app.command("uninstall-systemd")(uninstall)


def install(
    names: Names = None,
    own: OwnUnits = False,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Services of this file. [default: ./mdeploy.yaml]")
    ] = None,
    run_as: Annotated[
        str | None, typer.Option("--as", metavar="USER", help="Who services run as. [default: mdeploy, made for it]")
    ] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Enable them, start them at the next boot.")] = False,
    dry_run: options.DryRun = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Run services under systemd: from boot on, in a sandbox, as a user of their own.

    Without names: the services of ./mdeploy.yaml, or else every service known. Everything is checked
    before anything is changed; a service that does not become ready is taken back.
    """
    from mdeploy import installation, settings
    from mdeploy.cli.launching import Progress

    loaded = settings.load()
    wanted = tuple(dict.fromkeys(names or ()))
    request = installation.Request(wanted, _scope(own), run_as, file, start=not no_start)
    if dry_run:
        _show(installation.preview(loaded, request, output.say), as_json=as_json)
        return
    done = installation.install_services(loaded, request, output.say, Progress())
    output.emit({"services": [_row(o) for o in done]}, as_json=as_json, human=lambda: _table(done))


def uninstall(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Every unit of this MDEPLOY_HOME.")] = False,
    own: OwnUnits = False,
    dry_run: options.DryRun = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Stop services and take them out of systemd again.

    The services stay known and keep their keys; the user they ran as stays too.
    """
    from mdeploy import installation, settings

    if everything == bool(names):
        raise UsageError("name services, or say --all", hint="mdeploy ps lists them")
    loaded = settings.load()
    if dry_run:
        _show(installation.preview_removal(loaded, names or (), _scope(own)), as_json=as_json)
        return
    gone = installation.uninstall(loaded, names or (), _scope(own), output.say)
    output.emit({"services": list(gone)}, as_json=as_json, human=lambda: "\n".join(gone))


def _scope(own: bool) -> Scope:
    return "user" if own else "system"


def _show(preview: Preview, *, as_json: bool) -> None:
    files = [{"path": f.path, "mode": f"{f.mode:04o}", "content": f.content} for f in preview.files]
    document = {"files": files, "commands": list(preview.commands)}

    def human() -> str:
        texts = [f"# {f.path} ({f.mode:04o})\n{f.content}" for f in preview.files]
        return "\n".join([*texts, *(f"$ {command}" for command in preview.commands)])

    output.emit(document, as_json=as_json, human=human)


def _row(outcome: Outcome) -> dict[str, Any]:
    from mdeploy.cli.ps import row

    return {"unit": outcome.unit, "change": outcome.change, **row(outcome.status)}


def _table(done: tuple[Outcome, ...]) -> str:
    rows = [(o.status.spec.name, o.unit, o.change, o.status.phase, o.status.spec.url) for o in done]
    output.say("next: mdeploy ps · mdeploy logs NAME -f · systemctl status 'mdeploy@*'")
    return output.table(("NAME", "UNIT", "CHANGE", "PHASE", "URL"), rows)
