"""`mdeploy engines`: install, list and remove the environments that hold an engine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mdeploy.cli import options, output


class Variant(str, Enum):
    """Which build of an engine."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineKind(str, Enum):
    """Engines mdeploy can install."""

    vllm = "vllm"


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Environments that hold an engine (vLLM).", no_args_is_help=True, rich_markup_mode=None)
    group.command("install")(install)
    group.command("ls")(ls)
    group.command("rm")(rm)
    app.add_typer(group, name="engines")


def install(
    engine: Annotated[EngineKind, typer.Argument(help="What to install.")] = EngineKind.vllm,
    variant: Annotated[
        Variant, typer.Option("--variant", help="auto takes cuda where nvidia-smi answers.")
    ] = Variant.auto,
    version: Annotated[str | None, typer.Option("--version", metavar="V", help="Version of the engine.")] = None,
    python: Annotated[
        Path | None, typer.Option("--python", help="Adopt the environment of this interpreter instead.")
    ] = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Build an isolated environment holding vLLM, or adopt one that exists.

    Packages come from where pip gets them: its index, extra indexes, find-links, proxy and CA
    settings are handed on.
    """
    from mdeploy import services, settings

    built = services.install_engine(settings.load(), variant.value, version, python, say=output.say)
    output.emit(_row(built), as_json=as_json, human=lambda: f"{built.name}  {built.python}")


def ls(as_json: options.JsonFlag = False) -> None:
    """List the engines installed."""
    from mdeploy import services, settings

    found = services.list_engines(settings.load())
    columns = ("NAME", "VERSION", "VARIANT", "SIZE", "PYTHON")

    def human() -> str:
        if not found:
            return "no engine installed; mdeploy engines install vllm"
        rows = [
            (e.name, e.version, e.variant, output.human_bytes(e.bytes) if e.managed else "adopted", e.python)
            for e in found
        ]
        return output.table(columns, rows)

    output.emit({"engines": [_row(engine) for engine in found]}, as_json=as_json, human=human)


def rm(name: Annotated[str, typer.Argument(help="Engine, as `engines ls` names it.")]) -> None:
    """Remove an engine; an adopted environment is only forgotten."""
    from mdeploy import services, settings

    removed = services.remove_engine(settings.load(), name)
    output.say(
        f"removed {removed.name}" if removed.managed else f"forgot {removed.name}; {removed.python} is untouched"
    )


def _row(engine: object) -> dict[str, object]:
    import dataclasses

    return dataclasses.asdict(engine)  # type: ignore[call-overload,no-any-return]
