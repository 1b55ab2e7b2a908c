"""`mdeploy up`, `down`, `diff` and `rollback`: many services in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdeploy.cli import options, output

if TYPE_CHECKING:
    from mdeploy.cli.download import Bar
    from mdeploy.fleet import Applied, Listener, Outcome, Step
    from mdeploy.fleet.compare import Change, Compared
    from mdeploy.specs import ServiceStatus

File = Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="What to read.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Services of the file. [default: all]")]
_FILE = Path("mdeploy.yaml")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up")(up)
    app.command("down")(down)
    app.command("diff")(diff)
    app.command("rollback")(rollback)


def up(
    names: Names = None, file: File = _FILE, dry_run: options.DryRun = False, as_json: options.JsonFlag = False
) -> int:
    """Make a file of services true.

    Everything is checked before anything is touched. What is new is started, what changed is
    restarted, the rest is left alone; each service once those it depends on have answered. A name
    brings what it depends on. What is no longer in the file is reported, not stopped.
    """
    from mdeploy import fleet, settings
    from mdeploy.cli.download import progress_bar

    loaded = settings.load()
    with progress_bar() as bar:
        if dry_run:
            steps = fleet.preview(loaded, file, names or [], _listener(bar))
            output.emit({"services": [_step_row(s) for s in steps]}, as_json=as_json, human=lambda: _steps(steps))
            return 0
        applied = fleet.up(loaded, file, names or [], _listener(bar))
    for status in applied.gone:
        output.say(f"{status.spec.name} is no longer in {file} and still runs: mdeploy stop {status.spec.name}")
    output.emit(_applied_document(applied), as_json=as_json, human=lambda: _table(applied.outcomes))
    return _code(applied.outcomes)


def down(names: Names = None, file: File = _FILE) -> None:
    """Stop the services of a file.

    Dependents first; a name brings what depends on it. They stay known: up starts them again.
    """
    from mdeploy import fleet, settings

    def stopped(name: str, was_running: bool) -> None:
        output.say(f"{name} stopped" if was_running else f"{name} was not running")

    fleet.down(settings.load(), file, names or [], stopped)


def diff(file: File = _FILE, as_json: options.JsonFlag = False) -> int:
    """Show what up would change, key by key.

    Exits with 0 where nothing differs and with 1 where something does, as diff(1).
    """
    from mdeploy import fleet, settings

    found = fleet.diff(settings.load(), file)
    output.emit({"services": [_diff_row(one) for one in found]}, as_json=as_json, human=lambda: _differences(found))
    return int(any(one.difference != "unchanged" for one in found))


def rollback(
    name: Annotated[str, typer.Argument(help="A service, as `mdeploy ps` names it.")],
    to: Annotated[
        int | None, typer.Option("--to", metavar="N", help="Revision. [default: the last other one that was ready]")
    ] = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Bring an earlier revision of a service back.

    It is started as it was, and is a revision itself: a second rollback goes forward again.
    """
    from mdeploy import fleet, settings

    outcome = fleet.rollback(settings.load(), name, to, _listener(None))
    output.emit({"service": _row(outcome)}, as_json=as_json, human=lambda: _table([outcome]))


def _listener(bar: Bar | None) -> Listener:
    from mdeploy.cli.launching import Progress
    from mdeploy.fleet import Listener

    each: dict[str, Progress] = {}

    def look(status: ServiceStatus) -> None:
        each.setdefault(status.spec.name, Progress())(status)  # the clock of each starts with its own start

    def say(text: str) -> None:
        if bar:  # one transfer is over, and another or a start comes
            bar.end()
            bar.moving = False
        output.say(text)

    return Listener(say, bar, look)


def _code(outcomes: Sequence[Outcome]) -> int:
    """Tell every failure; the exit code is that of the first."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    for error in errors:
        output.say(f"error: {error.message}")
        if error.hint:
            output.say(f"hint:  {error.hint}")
    return int(errors[0].exit_code) if errors else 0


# JSON


def _applied_document(applied: Applied) -> dict[str, Any]:
    from mdeploy.cli.ps import row

    return {"services": [_row(one) for one in applied.outcomes], "gone": [row(status) for status in applied.gone]}


def _row(outcome: Outcome) -> dict[str, Any]:
    from mdeploy.cli.ps import row

    error = outcome.error
    return {
        "name": outcome.name,
        "action": outcome.action,
        "revision": outcome.revision,
        "changes": _changes(outcome.changes),
        "service": row(outcome.status) if outcome.status else None,
        "error": {"code": error.code, "message": error.message, "hint": error.hint} if error else None,
    }


def _diff_row(one: Compared) -> dict[str, Any]:
    return {
        "name": one.name,
        "difference": one.difference,
        "phase": one.status.phase if one.status else None,
        "revision": one.revision.number if one.revision else None,
        "changes": _changes(one.changes),
    }


def _step_row(step: Step) -> dict[str, Any]:
    from mdeploy.cli.launching import described

    return {**_diff_row(step.compared), **described(step.spec)}


def _changes(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [{"key": change.key, "old": change.old, "new": change.new} for change in changes]


# text


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        (
            o.name,
            o.action,
            str(o.revision or "-"),
            o.status.phase if o.status else "-",
            o.status.spec.url if o.status else "-",
        )
        for o in outcomes
    ]
    return output.table(("NAME", "ACTION", "REVISION", "PHASE", "URL"), rows)


def _steps(steps: Sequence[Step]) -> str:
    from mdeploy.cli.launching import rendered

    return "\n\n".join(f"{_difference(step.compared)}\n{rendered(step.spec)}" for step in steps)


def _differences(found: Sequence[Compared]) -> str:
    return "\n".join(_difference(one) for one in found)


def _difference(one: Compared) -> str:
    phase = f" ({one.status.phase})" if one.status else ""
    lines = [f"  {change.key}: {_value(change.old)} → {_value(change.new)}" for change in one.changes]
    return "\n".join([f"{one.name}: {one.difference}{phase}", *lines])


def _value(text: str | None) -> str:
    return "-" if text is None else text
