"""`mdeploy bench`: measure a running service, and say whether the measurement can be believed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.bench.types import BenchEndpoint, BenchOptions, BenchProgress, BenchResult, BenchTarget
from mdeploy.cli import options, output
from mdeploy.errors import ConfigError, ExitCode, UsageError
from mdeploy.specs import SCHEMA, to_json

if TYPE_CHECKING:
    from mdeploy.bench.load import OnProgress
    from mdeploy.bench.request import Ask

_DEFAULTS = BenchOptions()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|URL]", help="Service or server. Without one: the only service that runs."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", metavar="N", help="Requests in flight at any time.")
    ] = _DEFAULTS.concurrency,
    duration: Annotated[
        float | None,
        typer.Option("--duration", "-d", metavar="S", help="Start requests for S seconds. 30 where nothing is said."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", metavar="N", help="Or send exactly N requests.")
    ] = None,
    input_tokens: Annotated[
        int, typer.Option(metavar="N", help="Prompt length; exact where the server has /tokenize.")
    ] = _DEFAULTS.input_tokens,
    output_tokens: Annotated[
        int, typer.Option(metavar="N", help="Answer length; forced with ignore_eos where the server takes it.")
    ] = _DEFAULTS.output_tokens,
    endpoint: Annotated[
        BenchEndpoint | None, typer.Option(help="Which API to call. Without it: what the service is.")
    ] = None,
    path: Annotated[str | None, typer.Option(metavar="/PATH", help="App, or any server: the path to ask.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="BODY|@FILE", help="App: the body. Without it: the handler's example.")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option("--file", metavar="FIELD=@FILE", help="App: a file, or FIELD=text, of a form.")
    ] = None,
    content_type: Annotated[str | None, typer.Option(metavar="TYPE", help="App: media type of the body.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Served model. Without it: the first the server lists.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Load processes. Without it: one for every 256 in flight.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Longest time one request may take.")
    ] = _DEFAULTS.timeout_s,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = _DEFAULTS.seed,
    as_json: options.JsonFlag = False,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON result here.")
    ] = None,
) -> None:
    """Measure a server: N requests in flight, each followed by the next one.

    A language model is asked for tokens. An app is asked its handler's own example, or what
    --path, --data and --file say; --endpoint http asks any server so.

    Latencies run from a request's first byte sent to the kernel's receipt of
    the answer. Token counts are the server's own. MDEPLOY_API_KEY is the key
    of a server that wants one.

    The result is always printed. Exit status 6 means it must not be believed:
    this client was too busy, the load was not reached, the clock was set, or
    more than 5 % of the requests failed. An interrupt shows what was measured
    so far and exits with 130.
    """
    import dataclasses

    from mdeploy import bench as measure
    from mdeploy.bench import plan, request

    ask = request.asked(path, data, form or [], content_type)
    _check_endpoint(endpoint, ask)
    asked = BenchOptions(
        concurrency=concurrency,
        duration_s=duration,
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        endpoint=endpoint or ("http" if ask else _DEFAULTS.endpoint),
        workers=workers,
        timeout_s=timeout,
        seed=seed,
        ask=ask or request.Ask(),
    )
    plan.validate(asked)
    _check_writable(file)
    found = _target(target)
    found = dataclasses.replace(found, model=model) if model else found
    if endpoint is None and found.kind not in ("", "llm"):
        asked = dataclasses.replace(asked, endpoint="http")
    with _progress(found, asked) as on_progress:
        result = measure.run(found, asked, on_progress)
    _show(result, file, as_json=as_json)


def _check_endpoint(endpoint: BenchEndpoint | None, ask: Ask | None) -> None:
    if ask is not None and endpoint not in (None, "http"):
        raise UsageError(f"--path, --data and --file do not go with --endpoint {endpoint}", hint="--endpoint http")


def _target(text: str | None) -> BenchTarget:
    from mdeploy import services, settings

    return services.bench_target(settings.load(), text if text is None or "://" in text else _url(text))


def _url(text: str) -> str:
    """`localhost:8000` is an address; no service has a colon in its name."""
    return f"http://{text}" if ":" in text else text


def _show(result: BenchResult, file: Path | None, *, as_json: bool) -> None:
    from mdeploy.bench import report

    document = report.document(result)
    if file is not None:
        _write(file, to_json({"schema": SCHEMA, **document}))
    output.emit(document, as_json=as_json, human=lambda: report.human(result))
    if result.interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if not result.audit.valid:
        output.say(f"invalid: {'; '.join(result.audit.reasons)}")
        raise typer.Exit(ExitCode.INVALID)


def _check_writable(file: Path | None) -> None:
    """Find out before the load, not after it."""
    import tempfile

    if file is None:
        return
    if file.is_dir():
        raise UsageError(f"cannot write {file}: it is a directory", hint="-o names a file")
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}", hint="-o in another directory") from error


def _write(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(target: BenchTarget, asked: BenchOptions) -> Iterator[OnProgress | None]:
    """A living line where somebody watches, one plain line where nobody does."""
    from mdeploy.bench.plan import DEFAULT_DURATION_S

    end = f"{asked.requests} requests" if asked.requests else f"{asked.duration_s or DEFAULT_DURATION_S:g} s"
    about = f"measuring {target.name or target.base_url}: {asked.concurrency} at a time, {end}"
    if not sys.stderr.isatty():
        output.say(about)
        yield None
        return
    with output.stderr_console().status(about) as status:
        yield lambda now: status.update(f"{about}  [dim]{_line(now)}[/dim]")


def _line(now: BenchProgress) -> str:
    failed = f", {now.failed} failed" if now.failed else ""
    return f"{now.elapsed_s:.0f} s, {now.running} running, {now.completed} done{failed}"
