"""`mdeploy download`: a model from the hub into the ModelScope cache."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import options, output

if TYPE_CHECKING:
    from rich.progress import Progress

    from mdeploy.specs import LocalModel


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("download")(download)


def download(
    model: Annotated[str, typer.Argument(metavar="ID", help="owner/name, owner/name@revision or a model page's URL.")],
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    local_dir: Annotated[
        Path | None, typer.Option("--local-dir", help="Put the files here instead of into the cache.")
    ] = None,
    endpoint: options.Endpoint = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Download a model; print its directory.

    Every file is verified.
    What an earlier run left is resumed, and a complete model transfers nothing. The cache is the
    one the ModelScope SDK, vLLM and funasr use. Private models: set MODELSCOPE_API_TOKEN.
    """
    from mdeploy import settings, weights
    from mdeploy.hub import refs

    ref = refs.parse(model, revision)
    flags = {"cache_dir": str(cache_dir) if cache_dir else None, "endpoint": endpoint}
    loaded = settings.load(flags=flags)
    with progress_bar() as bar:
        found = weights.download(loaded, ref, local_dir=local_dir, progress=bar)
    output.say(_summary(found))
    output.emit(_document(found), as_json=as_json, human=lambda: found.path)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """Shows a transfer on stderr: a bar on a terminal, one line elsewhere."""
    bar = Bar()
    try:
        yield bar
    except BaseException as reason:
        bar.end()
        if bar.moving and not isinstance(reason, Exception):
            output.say("what has arrived is kept; the same command goes on from there")
        raise
    finally:
        bar.end()


class Bar:
    """A `hub.client.Progress` that draws. Rich is imported when there is something to draw."""

    def __init__(self) -> None:
        self.moving = False
        self._drawn: Progress | None = None

    def begin(self, files: int, total: int, done: int) -> None:
        """Show how much there is and how much is missing."""
        missing = f", {output.human_bytes(total - done)} to fetch" if 0 < done < total else ""
        output.say(f"{files} files, {output.human_bytes(total)}{missing}" if done < total else "verifying")
        self.moving = done < total
        if self.moving and sys.stderr.isatty():
            self._drawn = _draw(total, done)

    def advance(self, count: int) -> None:
        """Move by `count` bytes."""
        if self._drawn is not None:
            self._drawn.advance(self._drawn.task_ids[0], count)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None


def _draw(total: int, done: int) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    drawn = Progress(*columns, console=output.stderr_console(), transient=True)
    drawn.add_task("", total=total, completed=done)
    drawn.start()
    return drawn


def _summary(found: LocalModel) -> str:
    fetched = f"{output.human_bytes(found.fetched_bytes)} fetched" if found.fetched_bytes else "nothing to fetch"
    size = f"{found.files} files, {output.human_bytes(found.bytes)}"
    commit = f" (commit {found.commit[:8]})" if found.commit else ""
    return f"{found.ref}{commit}: {size}, {fetched}, {output.human_seconds(found.seconds)}"


def _document(found: LocalModel) -> dict[str, object]:
    fields = dataclasses.asdict(found)
    ref = fields.pop("ref")
    return {"model": ref["id"], "revision": ref["revision"], **fields}
