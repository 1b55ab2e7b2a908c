"""`mdeploy serve app`: from a user's class to a service that has answered."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import launching, options, output
from mdeploy.cli.launching import Mode, Restart
from mdeploy.errors import UsageError

if TYPE_CHECKING:
    from mdeploy.drafts import Terms
    from mdeploy.prepare_app import AppRequest
    from mdeploy.serving.options import ClusterOptions
    from mdeploy.settings import Settings
    from mdeploy.specs import AppWish, ServiceStatus

_RECIPE = (".yaml", ".yml")


def app(
    context: typer.Context,
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC…|RECIPE", help="FILE.py, FILE.py:Class, package.mod:Class; or a recipe (.yaml)."),
    ] = None,
    old: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="OLD.yaml", help="A configuration of easy-serve.")
    ] = None,
    name: launching.Name = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="ID|DIR", help="Model the handler loads, downloaded if missing.")
    ] = None,
    revision: options.Revision = None,
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", metavar="0,1|all|none", help="GPUs to use. [default: the freest, the CPU without any]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers-per-gpu", "--workers", metavar="N", help="Processes on each GPU, or on the CPU."),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help="Items in a batch, at most.")] = None,
    batch_cost: Annotated[
        float | None, typer.Option("--batch-cost", metavar="X", help="Sum of the handler's cost() in a batch, at most.")
    ] = None,
    max_wait_ms: Annotated[
        float | None, typer.Option("--max-wait-ms", metavar="MS", help="How long an idle worker waits for more items.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Time for a request, queue included, until 504.")
    ] = None,
    queue: Annotated[
        int | None, typer.Option("--queue", metavar="N", help="Requests that may wait; one more is answered 503.")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", metavar="INTERPRETER", help="Interpreter of the workers. [default: ours]")
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option("--path", metavar="DIR", help="Add to the workers' sys.path. [default: the file's directory]"),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="K=V", help="Set a variable of the workers; no secrets.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", metavar="ORIGIN", help="Let pages of this origin ask. May be *.")
    ] = None,
    max_body: Annotated[
        str | None, typer.Option("--max-body", metavar="SIZE", help="Largest request body. [default: 64MiB]")
    ] = None,
    reload: Annotated[bool, typer.Option("--reload", help="Start workers anew when a file changes.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Run the workers on this machine's cluster.")] = False,
    replicas: Annotated[
        str | None, typer.Option("--replicas", metavar="N|auto", help="Workers in the cluster. [default: auto]")
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option("--gpus-per-replica", metavar="X", min=0, help="May be a fraction. [default: 0]")
    ] = None,
    cpus_per_replica: Annotated[
        float | None, typer.Option("--cpus-per-replica", metavar="X", min=0, help="[default: 1]")
    ] = None,
    host: options.Host = None,
    port: launching.Port = None,
    insecure: launching.Insecure = False,
    start_timeout: launching.StartTimeout = None,
    drain: launching.Drain = None,
    restart: launching.RestartWhen = Restart.on_failure,
    detach: launching.Detach = False,
    dry_run: options.DryRun = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Serve your own class: batched, on every GPU, over HTTP.

    Each handler answers on its own path and has its own workers. A service takes its API key from
    MDEPLOY_API_KEY, or has one already (mdeploy keys). Options win over the recipe, the recipe over
    the class. Runs in the foreground until Ctrl-C unless -d is given. mdeploy init app NAME writes a
    first handler.
    """
    from mdeploy import drafts, settings, wishes
    from mdeploy.specs import AppWish

    mode = Mode(detach, dry_run, as_json)
    mode.check()
    if context.obj:
        raise UsageError(f"{context.obj[0]} after --: an app has no engine to take it", hint="mdeploy serve app --help")
    loaded = settings.load()
    wish = AppWish(
        python=python,
        paths=tuple(path or ()) or None,
        gpus=None if gpus is None else wishes.gpus_of(gpus),
        workers_per_gpu=workers,
        batch=batch,
        batch_cost=batch_cost,
        max_wait_ms=max_wait_ms,
        timeout=timeout,
        queue=queue,
        max_body=None if max_body is None else wishes.size_of(max_body),
        cors=tuple(cors or ()) or None,
    )
    terms = drafts.Terms(
        name=name,
        host=host,
        port=drafts.asked_port(loaded, port),
        insecure=insecure,
        env=_environment(env or []),
        limits=launching.limits(start_timeout, drain),
        restart=restart.value,
    )
    request = _with_handlers(loaded, _request(wish, terms, model, revision), specs or [], old)
    shares = _Shares(replicas, gpus_per_replica, cpus_per_replica)
    request = dataclasses.replace(request, reload=reload, cluster=_cluster(loaded, shares, wanted=cluster))
    launching.serve(loaded, request, mode, _welcome)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shares:
    """What the command line says of replicas in a cluster."""

    replicas: str | None
    gpus: float | None
    cpus: float | None

    @property
    def is_empty(self) -> bool:
        return self == _Shares(None, None, None)


def _request(wish: AppWish, terms: Terms, model: str | None, revision: str | None) -> AppRequest:
    from mdeploy.prepare_app import AppRequest
    from mdeploy.resolve import Wanted

    if revision is not None and model is None:
        raise UsageError("--revision goes with --model")
    return AppRequest(wish, terms, model=Wanted(model, revision) if model else None)


def _with_handlers(settings: Settings, request: AppRequest, specs: list[str], old: Path | None) -> AppRequest:
    """The request with what shall be served: handlers, a recipe, or a configuration of easy-serve."""
    if old is not None:
        if specs:
            raise UsageError("-c names the handlers: leave the others out")
        return _of_easyserve(request, old)
    if not specs:
        raise UsageError("nothing to serve is named", hint="mdeploy serve app FILE.py:Class, or mdeploy init app NAME")
    if _is_recipe(settings, specs[0]):
        if len(specs) > 1:
            raise UsageError("a recipe stands alone", hint="list several handlers in it: handler: [a.py:A, b.py:B]")
        return dataclasses.replace(request, recipe=specs[0])
    return dataclasses.replace(request, wish=dataclasses.replace(request.wish, handlers=tuple(specs)))


def _is_recipe(settings: Settings, text: str) -> bool:
    """A file, or the name of a shipped one like examples/text-to-text; no directory."""
    from mdeploy import recipes

    if text.endswith(_RECIPE):
        return True
    if text.endswith(".py") or ":" in text or Path(text).exists():
        return False
    return recipes.find_app(text, recipes.directories(settings.paths, Path.cwd())) is not None


def _of_easyserve(request: AppRequest, file: Path) -> AppRequest:
    """What the old configuration says; the command line wins."""
    from mdeploy import gpus, wishes
    from mdeploy.compat import easyserve
    from mdeploy.specs import AppWish

    old = easyserve.read_config(file)
    if old.ignored:
        output.say(f"{file}: not used: {', '.join(old.ignored)}")
    workers, devices = old.workers_per_gpu, tuple(map(int, old.gpus))
    if devices and request.wish.gpus is None and not gpus.probe():
        workers = len(devices) * workers
        output.say(f"this machine has no GPU: {workers} worker{'s' if workers > 1 else ''} on the CPU")
        devices = ()
    theirs = AppWish(handlers=old.handlers, paths=old.paths, gpus=devices or "none", workers_per_gpu=workers)
    terms = request.terms
    return dataclasses.replace(
        request,
        wish=wishes.joined(request.wish, theirs),
        terms=dataclasses.replace(terms, port=terms.port or old.port),
    )


def _environment(words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not (equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
            raise UsageError(f"--env {name}: a variable and its value", hint="--env NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _cluster(settings: Settings, shares: _Shares, *, wanted: bool) -> ClusterOptions | None:
    from mdeploy.serving.options import ClusterOptions

    if not wanted:
        if not shares.is_empty:
            raise UsageError("replicas belong to a cluster", hint="add --cluster, or say --workers-per-gpu")
        return None
    from mdeploy import cluster

    found = cluster.membership(settings)
    return ClusterOptions(
        address=found.address,
        token_file=str(found.token_file),
        replicas=_replicas(shares.replicas),
        gpus=_gpus_each(shares.gpus or 0.0),
        cpus=_cpus_each(1.0 if shares.cpus is None else shares.cpus),
    )


def _gpus_each(share: float) -> float:
    """What Ray can give: part of one GPU, or whole ones."""
    if share and not (0.01 <= share <= 1 or share.is_integer()):
        raise UsageError(f"--gpus-per-replica {share:g}: a part of a GPU from 0.01 to 1, or whole ones")
    return share


def _cpus_each(share: float) -> float:
    if share == float("inf"):
        raise UsageError("--cpus-per-replica inf: a number of cores")
    return share


def _replicas(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not (text.isdecimal() and text.isascii() and int(text) > 0):
        raise UsageError(f"--replicas {text}: a number from 1, or auto")
    return int(text)


def _welcome(status: ServiceStatus) -> None:
    spec = status.spec
    output.say(f"{spec.name} is ready: {spec.url}/docs  ({spec.model})")
    output.say(f"next: mdeploy bench {spec.name} · mdeploy logs {spec.name} -f · mdeploy stop {spec.name}")
