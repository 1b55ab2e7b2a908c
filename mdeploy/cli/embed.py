"""`mdeploy embed`: vectors from a running service, of a few texts or of a file of any size."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdeploy.cli import options, output
from mdeploy.errors import ConfigError, ExitCode, MdeployError, UsageError

if TYPE_CHECKING:
    from mdeploy.embedding.client import Client
    from mdeploy.embedding.lines import Source
    from mdeploy.embedding.sinks import Target
    from mdeploy.embedding.stream import Model, OnProgress, Outcome, Progress, StreamOptions
    from mdeploy.embedding.types import Answer, Item, Server, Wish

_SHOWN_NUMBERS, _MOST_COMPARED, _TEXT_WIDTH = 4, 12, 32
_SAY_EVERY_S = 10.0

Target_ = Annotated[str, typer.Argument(metavar="NAME|URL", help="Service or server.")]
PromptName = Annotated[
    str | None, typer.Option("--prompt-name", metavar="NAME", help="One of the model's own prompts, put before texts.")
]
Instruction = Annotated[
    str | None, typer.Option("--instruction", metavar="TEXT", help="What queries are asked for; makes texts queries.")
]
IsQuery = Annotated[bool, typer.Option("--query", help="The texts are queries, not documents.")]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Served model. Without it: the first the server lists.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("embed")(embed)


def embed(
    target: Target_,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to embed.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture, for models that take them.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE|-", help="Texts, one a line: plain, *.jsonl, either also *.gz."),
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", metavar="NAME", help="Member of a JSON line that is the text. [text]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="FILE.npy (float32 matrix) or FILE.jsonl.")
    ] = None,
    prompt_name: PromptName = None,
    instruction: Instruction = None,
    query: IsQuery = False,
    dimensions: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Numbers in a vector, where the model can be cut.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=2048, metavar="N", help="Texts in a request.")] = 32,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, max=256, metavar="N", help="Requests at once.")
    ] = 8,
    skip_errors: Annotated[
        bool,
        typer.Option("--skip-errors", help="Go on without the vectors of bad lines: NaN in .npy, error in .jsonl."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make the output anew, whatever is there.")] = False,
    timeout: Annotated[float, typer.Option(min=0.001, metavar="S", help="Longest time one request may take.")] = 120.0,
    patience: Annotated[
        float, typer.Option(min=0, metavar="S", help="How long a service may be busy or gone before it is given up.")
    ] = 300.0,
    model: ModelName = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Embed texts with a running service.

    A few texts: their vectors' first numbers, and how similar they are; --json prints all numbers.

    A file: row i of the output belongs to line i. Without -o, JSON lines on stdout. With -o,
    a run that was interrupted, killed, or met a full disk goes on where it was when the same
    command is given again; the lines already done must not have changed. FILE appears when it
    is complete, until then it is FILE.partial.

    A service that restarts or is busy is waited for. Exit status 1 means that a line has no
    vector. MDEPLOY_API_KEY is the key of a server that wants one.
    """
    from mdeploy.embedding import pictures
    from mdeploy.embedding.client import Client
    from mdeploy.embedding.stream import StreamOptions
    from mdeploy.embedding.types import Wish

    _check(texts, image, file, field, out)
    wish = Wish(dimensions, prompt_name, instruction, query, truncate)
    server = find(target, model)
    with Client(server, connections=concurrency, patience_s=patience, timeout_s=timeout) as client:
        if file is None:
            items: list[Item] = [*(texts or ()), *map(pictures.read, image or ())]
            _show(client, items, wish, as_json=as_json)
            return
        how = StreamOptions(batch, concurrency, skip_errors)
        job = _Job(client, wish, file, field, out, how, overwrite)
        _stream(job, as_json=as_json)


def _check(
    texts: list[str] | None, image: list[Path] | None, file: str | None, field: str | None, out: Path | None
) -> None:
    if file is None and not (texts or image):
        raise UsageError("name texts, or a file of texts with --file", hint="mdeploy embed NAME TEXT…")
    if file is not None and (texts or image):
        raise UsageError("--file does not go with texts or pictures beside it", hint="mdeploy embed NAME --file FILE")
    if file is None and (out or field):
        raise UsageError("-o and --field go with --file", hint="printf '%s\\n' TEXT… | mdeploy embed NAME -f - -o FILE")


def find(target: str, model: str | None) -> Server:
    """The service that is meant. Raises NotFoundError, NotReadyError, or UsageError for one that does not embed."""
    from mdeploy import services, settings
    from mdeploy.embedding.types import Server

    url = target if "://" in target or ":" not in target else f"http://{target}"
    found = services.bench_target(settings.load(), url)
    if found.kind not in ("", "embed", "gme"):
        raise UsageError(
            f"{target} is a service of kind {found.kind}", hint="mdeploy serve embed starts one that embeds"
        )
    return Server(found.base_url, model or found.model, found.api_key, found.name)


# a few texts


def _show(client: Client, items: list[Item], wish: Wish, *, as_json: bool) -> None:
    import orjson

    from mdeploy.embedding.types import RefusedError, numbers

    name = client.model()
    try:
        answer = client.embed(name, items, wish)
    except RefusedError as error:
        raise MdeployError(f"the service refuses it: {error.message}") from error
    vectors = [numbers(vector) for vector in answer.vectors]
    document = {
        "model": answer.model or name,
        "dim": len(vectors[0]),
        "embeddings": [orjson.Fragment(orjson.dumps(list(vector))) for vector in vectors],  # one a line
        "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens},
    }
    output.emit(document, as_json=as_json, human=lambda: _human(items, vectors, answer))


def _human(items: Sequence[Item], vectors: Sequence[Sequence[float]], answer: Answer) -> str:
    from mdeploy.embedding.types import cosine, norm

    about = f"{answer.model}: {len(vectors[0])} numbers a text, {answer.tokens} tokens"
    rows = [
        (
            str(number),
            _label(item),
            f"{norm(vector):.3f}",
            " ".join(f"{v:+.4f}" for v in vector[:_SHOWN_NUMBERS]) + " …",
        )
        for number, (item, vector) in enumerate(zip(items, vectors, strict=True), 1)
    ]
    parts = [about, output.table(("#", "text", "norm", "vector"), rows)]
    if 2 <= len(vectors) <= _MOST_COMPARED:
        names = [str(number) for number in range(1, len(vectors) + 1)]
        cells = [
            (name, *(f"{cosine(one, other):.3f}" for other in vectors))
            for name, one in zip(names, vectors, strict=True)
        ]
        parts.append(output.table(("cosine", *names), cells))
    return "\n\n".join(parts)


def _label(item: Item) -> str:
    from rich.cells import cell_len, set_cell_size

    text = " ".join(item.split()) if isinstance(item, str) else "(picture)"
    return text if cell_len(text) <= _TEXT_WIDTH else set_cell_size(text, _TEXT_WIDTH - 1).rstrip() + "…"


# a file


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """What is to be done with a file."""

    client: Client
    wish: Wish
    file: str
    field: str | None
    out: Path | None
    how: StreamOptions
    overwrite: bool


def _stream(job: _Job, *, as_json: bool) -> None:
    from mdeploy.embedding import stream
    from mdeploy.embedding.lines import Source

    if job.out is None and as_json:
        raise UsageError("--json goes with -o", hint="without -o stdout is JSON lines")
    with Source(job.file, job.field) as source:
        if job.out is not None:
            _check_output(job.out, job.file)
        model = stream.probe(job.client, job.wish)
        with _target(job, source, model) as target, _progress(job, source) as on_progress:
            try:
                outcome = stream.run(job.client, model, job.wish, source, target, job.how, on_progress)
            except BaseException as error:
                _say_where(job, error)
                raise
    _report(job, model, outcome, as_json=as_json)


def _check_output(out: Path, file: str) -> None:
    """Find out before the work, not after it."""
    from mdeploy.embedding import sinks

    sinks.for_path(out)
    if not out.parent.is_dir():
        raise ConfigError(f"cannot write {out}: there is no directory {out.parent}", hint=f"mkdir -p {out.parent}")
    if file != "-" and out.exists() and out.samefile(file):
        raise UsageError(f"{out} is the input itself", hint="-o names another file")


@contextlib.contextmanager
def _target(job: _Job, source: Source, model: Model) -> Iterator[Target]:
    from mdeploy.embedding import sinks

    if job.out is None:
        yield sinks.Pipe(sys.stdout.buffer)
        return
    asked = {"model": model.name, "dim": model.dim, "format": source.format, **job.wish.fields()}
    if source.format == "jsonl":
        asked["field"] = source.field
    with sinks.File(job.out, asked, overwrite=job.overwrite) as file:
        yield file


def _say_where(job: _Job, error: BaseException) -> None:
    """What is left of a run that did not end, and how it goes on."""
    from mdeploy.embedding.stream import ChangedError

    if job.out is None or isinstance(error, ChangedError):
        return
    if not job.out.with_name(f"{job.out.name}.progress").exists():
        return
    output.say(f"what is done is in {job.out}.partial; the same command goes on from there")


def _report(job: _Job, model: Model, outcome: Outcome, *, as_json: bool) -> None:
    for line, reason in outcome.errors:
        output.say(f"{job.file}, line {line}: {reason}")
    if outcome.failed > len(outcome.errors):
        output.say(f"… {outcome.failed} lines without a vector in all")
    if job.out is None:
        if outcome.failed:
            raise typer.Exit(ExitCode.FAILURE)
        return
    document: dict[str, Any] = {
        "model": model.name,
        "dim": model.dim,
        "output": str(job.out),
        "rows": outcome.rows,
        "failed": outcome.failed,
        "tokens": outcome.tokens,
        "resumed_rows": outcome.resumed,
        "seconds": round(outcome.seconds, 3),
        "errors": [{"line": line, "message": reason} for line, reason in outcome.errors],
    }
    output.emit(document, as_json=as_json, human=lambda: _summary(job, model, outcome))
    if outcome.failed:
        raise typer.Exit(ExitCode.FAILURE)


def _summary(job: _Job, model: Model, outcome: Outcome) -> str:
    rate = (outcome.rows - outcome.resumed) / outcome.seconds if outcome.seconds else 0.0
    before = f", {outcome.resumed:,} of them before" if outcome.resumed else ""
    failed = f", {outcome.failed:,} without a vector" if outcome.failed else ""
    took = f"{output.human_seconds(outcome.seconds)}, {rate:,.0f} a second"
    rows = "1 row" if outcome.rows == 1 else f"{outcome.rows:,} rows"
    return f"{job.out}: {rows} of {model.dim} numbers{before}{failed} ({took})"


@contextlib.contextmanager
def _progress(job: _Job, source: Source) -> Iterator[OnProgress]:
    """A living line where somebody watches, a plain line now and then where nobody does."""
    meter = _Meter(job.out, source.size)
    if not sys.stderr.isatty():
        yield meter.plain
        return
    with output.stderr_console().status("embedding") as status:

        def show(now: Progress) -> None:
            if line := meter.line(now, 0.1):
                status.update(line)

        yield show


class _Meter:
    """Progress in words: how much, how fast, how long still."""

    def __init__(self, out: Path | None, size: int | None) -> None:
        self._name, self._size = str(out) if out else "stdout", size
        self._begun = self._said = time.monotonic()
        self._first_read: int | None = None

    def plain(self, now: Progress) -> None:
        """A line on stderr, unless there was one just now."""
        if line := self.line(now, _SAY_EVERY_S):
            output.say(line)

    def line(self, now: Progress, every_s: float) -> str:
        """The line, or nothing where the last one is not that long ago."""
        clock = time.monotonic()
        if self._first_read is None:
            self._first_read = now.read
        if clock - self._said < every_s:
            return ""
        self._said, seconds = clock, clock - self._begun
        parts = [f"{self._name}: {now.rows:,} texts", f"{(now.rows - now.resumed) / seconds:,.0f} a second"]
        if self._size:
            parts.append(f"{100 * now.read / self._size:.0f} %")
            if now.read > self._first_read:
                left = (self._size - now.read) * seconds / (now.read - self._first_read)
                parts.append(f"about {output.human_seconds(left)} left")
        if now.failed:
            parts.append(f"{now.failed:,} without a vector")
        return ", ".join(parts)
