"""`mdeploy serve llm`: from a language model to a service that has answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import launching, options, output
from mdeploy.cli.launching import Mode, Restart
from mdeploy.recipes import DEFAULT_LLM

if TYPE_CHECKING:
    from mdeploy.specs import ServiceStatus


def llm(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RECIPE", help="Hub id, model directory, or recipe (.yaml).")
    ] = DEFAULT_LLM,
    name: launching.Name = None,
    tp: Annotated[int | None, typer.Option("--tp", help="GPUs (CPU: processes) that share one copy.")] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="0,1", help="GPUs to use. [default: the freest that no service has]")
    ] = None,
    host: options.Host = None,
    port: launching.Port = None,
    insecure: launching.Insecure = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option("--gpu-memory-utilization", metavar="SHARE", help="Share of GPU memory to use.")
    ] = None,
    max_model_len: Annotated[
        str | None, typer.Option("--max-model-len", metavar="TOKENS", help="Context length: 8192, 8k or auto.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, bfloat16, float16, float32.")] = None,
    revision: options.Revision = None,
    engine: options.EngineName = None,
    start_timeout: launching.StartTimeout = None,
    drain: launching.Drain = None,
    restart: launching.RestartWhen = Restart.on_failure,
    detach: launching.Detach = False,
    dry_run: options.DryRun = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Serve a language model with vLLM, OpenAI's API on top.

    A model that is not in the cache is downloaded first. The API key, if any, is taken from
    MDEPLOY_API_KEY, or is the one the service has already (mdeploy keys). Runs in the foreground
    until Ctrl-C unless -d is given. What stands after -- goes to vLLM as it is:
    mdeploy serve llm -- --max-num-seqs 64
    """
    from mdeploy import drafts, prepare_llm, settings
    from mdeploy.resolve import Wanted
    from mdeploy.specs import LlmOptions

    mode = Mode(detach, dry_run, as_json)
    mode.check()
    loaded = settings.load()
    wish = LlmOptions(tp, _gpus(gpus), gpu_memory_utilization, max_model_len, dtype, tuple(context.obj or ()))
    terms = drafts.Terms(
        name=name,
        host=host,
        port=drafts.asked_port(loaded, port),
        insecure=insecure,
        limits=launching.limits(start_timeout, drain),
        restart=restart.value,
    )
    launching.serve(loaded, prepare_llm.LlmRequest(Wanted(model, revision), wish, terms, engine), mode, _welcome)


def _gpus(text: str | None) -> tuple[int, ...] | None:
    from mdeploy import devices

    found = None if text is None else devices.indices(text)
    if text is not None and found is None:
        raise typer.BadParameter("GPU numbers separated by commas, each once, like 0,1", param_hint="--gpus")
    return found


def _welcome(status: ServiceStatus) -> None:
    spec = status.spec
    output.say(f"{spec.name} is ready: {spec.url}/v1  (model {spec.model})")
    output.say(f"next: mdeploy bench {spec.name} · mdeploy logs {spec.name} -f · mdeploy stop {spec.name}")
