"""`mdeploy serve embed` and `mdeploy serve gme`: from an embedding model to a service that has answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import launching, options, output
from mdeploy.cli.launching import Mode, Restart
from mdeploy.recipes import DEFAULT_EMBED, DEFAULT_GME

if TYPE_CHECKING:
    from mdeploy.prepare_embed import EmbedKind
    from mdeploy.specs import EmbedWish, ServiceStatus
    from mdeploy.variables import Variables


_EMBED = f"""Serve an embedding model or a reranker: OpenAI's API, packed batches, every GPU named.

Takes Qwen3-Embedding, BERT- and XLM-R-like models with sentence-transformers' files, and cross-encoders (/v1/rerank).
Without MODEL it is {DEFAULT_EMBED}. What is missing is downloaded first. One replica runs on each
GPU of --gpus behind one port; a model too large for one GPU goes over several with --backend vllm --tp N, which takes
vLLM's own flags after --. The variables that servers of this kind used to read (MODEL_PATH, DEVICE,
EMBEDDING_DIMENSION, API_KEY, PORT …) count, from the environment or .env; flags win. Runs in the foreground until
Ctrl-C unless -d is given.
"""

_GME = f"""Serve GME-Qwen2-VL: texts, images and both together become vectors of one space.

Without MODEL it is {DEFAULT_GME}. What is missing is downloaded first: to GME_MODEL_DIR/OWNER/NAME
where that variable names a directory, in which a model that is there already is used as it is. Images travel as data:
URIs in /v1/embeddings or as files to /embed/image. Everything else is as in mdeploy serve embed.
"""


def _command(kind: EmbedKind, usual: str, text: str) -> Callable[..., None]:
    """The command of a kind: both take the same options."""

    def serve(
        context: typer.Context,
        model: Annotated[
            str | None,
            typer.Argument(metavar="MODEL|RECIPE", help="Hub id, model directory, or recipe (.yaml)."),
        ] = None,
        name: launching.Name = None,
        gpus: Annotated[
            str | None,
            typer.Option("--gpus", metavar="0,1|all|none", help="A replica on each. [default: the freest, or the CPU]"),
        ] = None,
        workers: Annotated[
            int | None,
            typer.Option("--workers-per-gpu", "--workers", metavar="N", help="Replicas on each GPU, or on the CPU."),
        ] = None,
        dimensions: Annotated[
            int | None,
            typer.Option("--dimensions", metavar="N", help="Size of a vector where a request does not say."),
        ] = None,
        dtype: Annotated[
            str | None, typer.Option("--dtype", metavar="T", help="auto, float32, bfloat16 or float16.")
        ] = None,
        batch_tokens: Annotated[
            int | None,
            typer.Option("--batch-tokens", metavar="N", help="Tokens in a batch. [default: measured at the start]"),
        ] = None,
        max_length: Annotated[
            int | None, typer.Option("--max-length", metavar="N", help="Longest text in tokens. [default: the model's]")
        ] = None,
        attention: Annotated[
            str | None, typer.Option("--attention", metavar="A", help="auto, packed or padded.")
        ] = None,
        compiled: Annotated[
            bool | None, typer.Option("--compile/--no-compile", help="A slower start, then faster on a GPU.")
        ] = None,
        truncate: Annotated[
            bool | None,
            typer.Option("--truncate/--no-truncate", help="Cut texts that are too long, instead of refusing them."),
        ] = None,
        token_ids: Annotated[
            str | None,
            typer.Option("--token-ids", metavar="reject|model", help="Token ids as input: refused, or the model's."),
        ] = None,
        instruction: Annotated[
            str | None, typer.Option("--instruction", metavar="TEXT", help="What queries are asked for.")
        ] = None,
        timeout: Annotated[
            float | None, typer.Option("--timeout", metavar="S", help="Time for a request, queue included, until 504.")
        ] = None,
        max_body: Annotated[
            str | None, typer.Option("--max-body", metavar="SIZE", help="Largest request body. [default: 64MiB]")
        ] = None,
        cors: Annotated[
            list[str] | None, typer.Option("--cors", metavar="ORIGIN", help="Let pages of this origin ask. May be *.")
        ] = None,
        python: Annotated[
            str | None,
            typer.Option("--python", metavar="INTERPRETER", help="Has torch. [default: ours, else that of vLLM]"),
        ] = None,
        backend: Annotated[
            str | None, typer.Option("--backend", metavar="mdeploy|vllm", help="Who computes. [default: mdeploy]")
        ] = None,
        tp: Annotated[
            int | None, typer.Option("--tp", metavar="N", help="GPUs that share one copy (--backend vllm).")
        ] = None,
        engine: options.EngineName = None,
        revision: options.Revision = None,
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
        from mdeploy import drafts, settings, variables, wishes
        from mdeploy.prepare_embed import EmbedRequest
        from mdeploy.resolve import Wanted
        from mdeploy.specs import EmbedWish

        mode = Mode(detach, dry_run, as_json)
        mode.check()
        wish = EmbedWish(
            backend=backend,
            gpus=None if gpus is None else wishes.gpus_of(gpus),
            dtype=dtype,
            max_length=max_length,
            workers_per_gpu=workers,
            dimensions=dimensions,
            batch_tokens=batch_tokens,
            attention=attention,
            compile=compiled,
            truncate=truncate,
            token_ids=token_ids,
            instruction=instruction,
            timeout=timeout,
            max_body=None if max_body is None else wishes.size_of(max_body),
            cors=tuple(cors or ()) or None,
            python=python,
            tp=tp,
            engine=engine,
            args=tuple(context.obj or ()) or None,
        )
        of_vllm = backend == "vllm"  # it chooses devices by --tp, and has no size to be told
        flags = variables.Flags(
            port=port is not None,
            model=model is not None,
            gpus=gpus is not None or of_vllm,
            dimensions=dimensions is not None or of_vllm,
        )
        found = variables.read(settings.load(), kind, flags)
        for line in found.told:
            output.say(line)
        terms = drafts.Terms(
            name=name,
            host=host,
            port=found.port or drafts.asked_port(found.settings, port),
            insecure=insecure,
            limits=launching.limits(start_timeout, drain),
            restart=restart.value,
        )
        wanted = Wanted(model or found.model or usual, revision, root=found.root)
        request = EmbedRequest(kind, wanted, _with(found, wish), terms, found.access_log)
        launching.serve(found.settings, request, mode, _welcome)

    serve.__doc__ = text
    return serve


def _with(found: Variables, wish: EmbedWish) -> EmbedWish:
    """The wish with what the variables say beside it."""
    import dataclasses

    if wish.gpus is None:
        wish = dataclasses.replace(wish, gpus=found.gpus, gpu_count=found.gpu_count)
    return wish if found.dimensions is None else dataclasses.replace(wish, dimensions=found.dimensions)


embed = _command("embed", DEFAULT_EMBED, _EMBED)
gme = _command("gme", DEFAULT_GME, _GME)


def _welcome(status: ServiceStatus) -> None:
    spec = status.spec
    output.say(f"{spec.name} is ready: {spec.url}/v1  (model {spec.model})")
    embed = "" if spec.probe.request_path == "/v1/rerank" else f"mdeploy embed {spec.name} TEXT · "
    output.say(f"next: {embed}mdeploy bench {spec.name} · mdeploy stop {spec.name}")
