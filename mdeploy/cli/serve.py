"""`mdeploy serve`: from a model to a service that has answered."""

from __future__ import annotations

import os
import shlex
import sys
import time
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mdeploy.cli import options, output
from mdeploy.errors import UsageError
from mdeploy.recipes import DEFAULT_LLM

if TYPE_CHECKING:
    from mdeploy.specs import Limits, ServiceSpec, ServiceStatus
    from mdeploy.supervise.state import ServiceFiles


class Restart(str, Enum):
    """When a supervisor starts its engine again."""

    always = "always"
    on_failure = "on-failure"
    never = "never"


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Start a service.", no_args_is_help=True, rich_markup_mode=None)
    group.command("llm")(llm)
    app.add_typer(group, name="serve")


def llm(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RECIPE", help="Hub id, model directory, or recipe (.yaml).")
    ] = DEFAULT_LLM,
    name: Annotated[str | None, typer.Option("--name", help="Name of the service. [default: the model's]")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="GPUs (CPU: processes) that share one copy.")] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="0,1", help="GPUs to use. [default: the freest that no service has]")
    ] = None,
    host: options.Host = None,
    port: Annotated[int | None, typer.Option("--port", help="Port. [default: the first free one from 8000]")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow another address than loopback without an API key.")
    ] = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option("--gpu-memory-utilization", metavar="SHARE", help="Share of GPU memory to use.")
    ] = None,
    max_model_len: Annotated[
        str | None, typer.Option("--max-model-len", metavar="TOKENS", help="Context length: 8192, 8k or auto.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, bfloat16, float16, float32.")] = None,
    revision: options.Revision = None,
    engine: options.EngineName = None,
    start_timeout: Annotated[
        float | None,
        typer.Option("--start-timeout", min=1, metavar="S", help="Time to become ready. [default: 1800]"),
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option("--drain", min=0, metavar="S", help="Time a stop leaves requests in flight. [default: 30]"),
    ] = None,
    restart: Annotated[
        Restart, typer.Option("--restart", help="What to do when the engine ends without being asked.")
    ] = Restart.on_failure,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Go on in the background once it has answered.")
    ] = False,
    dry_run: options.DryRun = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Serve a language model with vLLM, OpenAI's API on top.

    A model that is not in the cache is downloaded first. The API key, if any, is taken from
    MDEPLOY_API_KEY, or is the one the service has already (mdeploy keys). Runs in the foreground
    until Ctrl-C unless -d is given. What stands after -- goes to vLLM as it is:
    mdeploy serve llm -- --max-num-seqs 64
    """
    from mdeploy import prepare, services, settings
    from mdeploy.cli.download import progress_bar
    from mdeploy.resolve import Wanted
    from mdeploy.specs import LlmOptions

    if as_json and not (detach or dry_run):
        raise UsageError("--json goes with -d or --dry-run", hint="in the foreground stdout is the engine's log")
    loaded = settings.load()
    wish = LlmOptions(tp, _gpus(gpus), gpu_memory_utilization, max_model_len, dtype, tuple(context.obj or ()))
    request = prepare.LlmRequest(
        Wanted(model, revision),
        wish,
        name=name,
        host=host,
        port=prepare.asked_port(loaded, port),
        insecure=insecure,
        engine=engine,
        limits=_limits(start_timeout, drain),
        restart=restart.value,
    )
    with progress_bar() as bar:
        spec = prepare.prepare_llm(loaded, request, dry_run=dry_run, progress=bar, say=output.say)
    if dry_run:
        output.emit(described(spec), as_json=as_json, human=lambda: rendered(spec))
        return
    for reason in spec.plan.reasons if spec.plan else ():
        output.say(reason)
    if not detach:
        _foreground(spec, services.files_of(loaded, spec.name))
    status = services.launch(loaded, spec.name, Progress())
    output.emit(_row(status), as_json=as_json, human=lambda: _welcome(status))


def _gpus(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts) or len(set(map(int, parts))) != len(parts):
        raise typer.BadParameter("GPU numbers separated by commas, each once, like 0,1", param_hint="--gpus")
    return tuple(int(part) for part in parts)


def _foreground(spec: ServiceSpec, files: ServiceFiles) -> NoReturn:
    """Become the supervisor: the same main process as in every other mode."""
    from mdeploy.supervise.control import run_command

    output.say(f"starting {spec.name} on {spec.url} (Ctrl-C stops it)")
    sys.stdout.flush()
    command, env = run_command(files)
    os.chdir("/")  # `python -m` imports from the current directory first
    os.execve(command[0], command, env)


def _limits(start_timeout: float | None, drain: float | None) -> Limits:
    from mdeploy.specs import Limits

    usual = Limits()
    return Limits(
        start_timeout_s=usual.start_timeout_s if start_timeout is None else start_timeout,
        stop_timeout_s=usual.stop_timeout_s if drain is None else drain,
    )


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


def _welcome(status: ServiceStatus) -> str:
    spec = status.spec
    output.say(f"{spec.name} is ready: {spec.url}/v1  (model {spec.model})")
    output.say(f"next: mdeploy bench {spec.name} · mdeploy logs {spec.name} -f · mdeploy stop {spec.name}")
    return spec.url
