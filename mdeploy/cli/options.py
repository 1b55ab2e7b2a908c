"""Options that mean the same in every command, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, then do nothing.")]
Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="URL", help="Hub to use. [default: $MODELSCOPE_ENDPOINT or modelscope.cn]"),
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Model cache. [default: $MODELSCOPE_CACHE or ~/.cache/modelscope]"),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="R", help="Branch, tag or commit. [default: master]")
]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on. [default: 127.0.0.1]")]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", metavar="NAME[@VERSION]", help="Engine environment, see `mdeploy engines ls`."),
]
