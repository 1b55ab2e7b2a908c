"""`mdeploy serve`: the kinds of services there are."""

from __future__ import annotations

import typer

from mdeploy.cli import serve_embed
from mdeploy.cli.serve_app import app as serve_app
from mdeploy.cli.serve_llm import llm as serve_llm


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Start a service.", no_args_is_help=True, rich_markup_mode=None)
    group.command("llm")(serve_llm)
    group.command("app")(serve_app)
    group.command("embed")(serve_embed.embed)
    group.command("gme")(serve_embed.gme)
    app.add_typer(group, name="serve")
