"""The one renderer: results on stdout, everything else on stderr, plain when nobody watches.

Commands hand over frozen results; nothing below the command line prints.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mdeploy.errors import MdeployError
from mdeploy.specs import SCHEMA

if TYPE_CHECKING:
    from rich.console import Console


def emit(data: dict[str, Any], *, as_json: bool, human: Callable[[], str]) -> None:
    """Print one result: the document with its schema under --json, else what `human` returns."""
    if as_json:
        print_json({"schema": SCHEMA, **data})
        return
    text = human()
    if text:
        print(text, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, UTF-8 as it is."""
    import orjson

    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode(), flush=True)


def say(text: str) -> None:
    """A line of progress or advice, on stderr."""
    print(text, file=sys.stderr, flush=True)


def fail(error: MdeployError, *, as_json: bool) -> int:
    """Show an error with its way out and return the exit code it asks for."""
    if as_json:
        print_json({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    else:
        say(f"error: {error.message}")
        if error.hint:
            say(f"hint:  {error.hint}")
    return int(error.exit_code)


def stderr_console() -> Console:
    """A rich console for progress bars; silent decoration when stderr is no terminal."""
    from rich.console import Console

    return Console(stderr=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under a header, aligned by display width (CJK counts two); on a terminal no line wraps."""
    from rich.cells import cell_len, set_cell_size

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]

    def render(line: Sequence[str]) -> str:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        text = "  ".join(cells).rstrip()
        return text if width is None or cell_len(text) <= width else set_cell_size(text, width - 1) + "…"

    return "\n".join(render(line) for line in lines)


def human_bytes(count: float) -> str:
    """Bytes with a binary unit and three figures, as `ls -h` readers expect."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_seconds(seconds: float) -> str:
    """A duration a person reads at a glance: 0.4s, 12s, 3m 5s, 2h 10m, 4d 3h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part}{small}"
    return f"{whole}s"
