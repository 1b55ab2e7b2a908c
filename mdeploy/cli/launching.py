"""What the commands that start a service share: their options in common, progress, and how the result is shown."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mdeploy.cli import output
from mdeploy.errors import UsageError

if TYPE_CHECKING:
    from mdeploy.prepare import Request
    from mdeploy.settings import Settings
    from mdeploy.specs import Limits, ServiceSpec, ServiceStatus
    from mdeploy.supervise.state import ServiceFiles


class Restart(str, Enum):
    """When a supervisor starts its engine again."""

    always = "always"
    on_failure = "on-failure"
    never = "never"


Name = Annotated[str | None, typer.Option("--name", help="Name of the service. [default: made of what it serves]")]
Port = Annotated[int | None, typer.Option("--port", help="Port. [default: the first free one from 8000]")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow another address than loopback without an API key.")]
StartTimeout = Annotated[
    float | None,
    typer.Option("--start-timeout", min=1, metavar="S", help="Time to become ready. [default: 1800]"),
]
Drain = Annotated[
    float | None,
    typer.Option("--drain", min=0, metavar="S", help="Time a stop leaves requests in flight. [default: 30]"),
]
RestartWhen = Annotated[Restart, typer.Option("--restart", help="What to do when the engine ends without being asked.")]
Detach = Annotated[bool, typer.Option("-d", "--detach", help="Go on in the background once it has answered.")]


@dataclass(frozen=True, slots=True)
class Mode:
    """How a service is started and how that is told."""

    detach: bool
    dry_run: bool
    as_json: bool

    def check(self) -> None:
        """Raise UsageError for a mode that cannot be."""
        if self.as_json and not (self.detach or self.dry_run):
            raise UsageError("--json goes with -d or --dry-run", hint="in the foreground stdout is the engine's log")


def limits(start_timeout: float | None, drain: float | None) -> Limits:
    """The deadlines a command line names, the usual ones where it does not."""
    from mdeploy.specs import Limits

    usual = Limits()
    return Limits(
        start_timeout_s=usual.start_timeout_s if start_timeout is None else start_timeout,
        stop_timeout_s=usual.stop_timeout_s if drain is None else drain,
    )


def serve(settings: Settings, request: Request, mode: Mode, welcome: Callable[[ServiceStatus], None]) -> None:
    """Prepare a service and start it, or with --dry-run show what would be started. `welcome` says that it is ready."""
    from mdeploy import prepare, services
    from mdeploy.cli.download import progress_bar

    with progress_bar() as bar:
        spec = prepare.prepare(settings, request, dry_run=mode.dry_run, progress=bar, say=output.say)
    if mode.dry_run:
        output.emit(described(spec), as_json=mode.as_json, human=lambda: rendered(spec))
        return
    for reason in spec.plan.reasons if spec.plan else ():
        output.say(reason)
    if not mode.detach:
        _foreground(spec, services.files_of(settings, spec.name))
    status = services.launch(settings, spec.name, Progress())

    def human() -> str:
        welcome(status)
        return status.spec.url

    output.emit(_row(status), as_json=mode.as_json, human=human)


def _foreground(spec: ServiceSpec, files: ServiceFiles) -> NoReturn:
    """Become the supervisor: the same main process as in every other mode."""
    from mdeploy.supervise.control import run_command

    output.say(f"starting {spec.name} on {spec.url} (Ctrl-C stops it)")
    sys.stdout.flush()
    command, env = run_command(files)
    os.chdir("/")  # `python -m` imports from the current directory first
    os.execve(command[0], command, env)


class Progress:
    """Says each step of a start-up once, with the time it was reached."""

    def __init__(self) -> None:
        self._said = ""
        self._start = time.monotonic()

    def __call__(self, status: ServiceStatus) -> None:
        """Note one look at the service."""
        text = status.detail if status.phase == "starting" else ""
        if text and text != self._said:
            self._said = text
            output.say(f"  {time.monotonic() - self._start:5.1f}s  {text}")


def described(spec: ServiceSpec) -> dict[str, object]:
    """A spec as the JSON contract has it, secrets masked."""
    import dataclasses

    return {"service": {**dataclasses.asdict(spec), "secrets": dict.fromkeys(spec.secrets, "***")}}


def rendered(spec: ServiceSpec) -> str:
    """The command as a shell would take it, one flag a line, secrets masked."""
    env = {**spec.env, **dict.fromkeys(spec.secrets, "***")}
    lines = [f"{name}={value if name in spec.secrets else shlex.quote(value)}" for name, value in env.items()]
    lines.append("")
    for index, word in enumerate(spec.argv):
        is_flag = word.startswith("--") and index > 0
        lines += [shlex.quote(word)] if is_flag else []
        lines[-1] += "" if is_flag else f" {shlex.quote(word)}"
    reasons = [f"# {reason}" for reason in (spec.plan.reasons if spec.plan else ())]
    return "\n".join([*reasons, " \\\n  ".join(line.strip() for line in lines)])


def _row(status: ServiceStatus) -> dict[str, object]:
    from mdeploy.cli.ps import row

    return {"service": row(status)}
