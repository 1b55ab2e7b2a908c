"""From what a user asked of an embedding service to a spec: recipe, checkpoint, interpreter, devices, command."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mdeploy import (
    credentials,
    drafts,
    fit,
    gpus,
    interpreters,
    prepare_app,
    prepare_llm,
    recipes,
    resolve,
    settings,
    wishes,
)
from mdeploy.apps.embed import checkpoint
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.drafts import Draft, Terms, Weights
from mdeploy.errors import ConfigError, UsageError
from mdeploy.interpreters import Chosen
from mdeploy.prepare_llm import LlmDraft
from mdeploy.reservations import Neighbours
from mdeploy.resolve import Model, Wanted
from mdeploy.serving.options import DEFAULT_BODY_BYTES, AppOptions
from mdeploy.settings import Settings
from mdeploy.specs import EmbedRecipe, EmbedWish, GpuPlan, LlmOptions, ModelRecipe, Probe, ServiceSpec, fingerprint

EmbedKind = Literal["embed", "gme"]

PACKAGES: Mapping[str, str] = {"torch": "2.10", "transformers": "5", "tokenizers": "", "numpy": "", "safetensors": ""}
"""What the interpreter of the workers needs, and from which version on."""

_PACKAGES_OF: Mapping[EmbedKind, Mapping[str, str]] = {"embed": PACKAGES, "gme": {**PACKAGES, "pillow": "11"}}
_EDGE_MODULES = ("tokenizers", "numpy")
_TUNING = ("NCCL_", "OMP_", "MKL_", "KMP_", "GOMP_", "PYTORCH_")
"""Variables of the user's that tune libraries of the workers; a unit would not inherit them, so the spec has them."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """What an embedding service shall be, before anything is looked up. What is wished for wins over recipes."""

    kind: EmbedKind
    wanted: Wanted
    wish: EmbedWish = field(default_factory=EmbedWish)
    terms: Terms = field(default_factory=Terms)
    access_log: bool = True


@dataclass(frozen=True, slots=True)
class EmbedDraft(Draft):
    """A model with the interpreter of its workers: what they need to be started but a place."""

    request: EmbedRequest
    served: Model
    chosen: Chosen
    env: Mapping[str, str]

    def weigh(self, directory: Path | None) -> Weights:
        """See `Draft`."""
        return _weighed(self.request, self.served, directory)

    def plan(self, weights: Weights, others: Neighbours, before: tuple[int, ...]) -> GpuPlan:
        """See `Draft`. Raises DoesNotFitError also for a model that no device chosen is large enough for."""
        wish = self.request.wish
        found = prepare_app.on_devices(wish.gpus, wish.gpu_count, others, before)
        told = self._fits(weights.checkpoint, found) if weights.checkpoint else ()
        ours = (self.chosen.reason,) if self.chosen.reason else ()
        return dataclasses.replace(found, reasons=(*found.reasons, *told, *ours))

    def _fits(self, model: Checkpoint, plan: GpuPlan) -> tuple[str, ...]:
        wish, title = self.request.wish, self.served.title
        workers = wish.workers_per_gpu or 1
        fast = fit.has_fast_bf16(Path("/proc/cpuinfo").read_text(errors="replace"))
        needed = fit.need(model, wish, plan.device, fast_bf16=fast)
        if plan.device == "cuda":
            on = [gpu for gpu in gpus.probe() if gpu.index in plan.indices]
            serve = f"mdeploy serve {self.request.kind} {self.served.source}"
            return fit.check_gpus(title, needed, workers, on, serve)
        import psutil

        memory = psutil.virtual_memory()
        return fit.check_host(title, needed, workers, memory.total, memory.available)

    def spec(self, settings: Settings, weights: Weights, plan: GpuPlan | None, port: int) -> ServiceSpec:
        """See `Draft`."""
        assert plan is not None
        assert weights.directory is not None
        terms, kind = self.terms, self.request.kind
        secrets = credentials.secrets_of(settings.paths, self.name, of_vllm=False) if self.key else {}
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if plan.device == "cuda" else {}
        options = self._options(weights.directory, plan, port)
        path, body = _question(weights.checkpoint, options.names[0])
        return ServiceSpec(
            name=self.name,
            kind=kind,
            argv=(sys.executable, "-m", "mdeploy.apps", kind, *options.argv()),
            env={**order, **self.env},
            cwd=str(settings.paths.service(self.name)),
            host=self.host,
            port=port,
            probe=Probe("/health", path, body, bearer=next(iter(secrets), None), work_metrics=_WORK_METRICS),
            model=options.names[0],
            source=self.served.source,
            plan=plan,
            secrets=secrets,
            limits=terms.limits,
            restart=terms.restart,
            reloads=True,
            depends_on=terms.depends_on,
        )

    def stands_for(self) -> Mapping[str, str]:
        """See `Draft`."""
        recipe, python = self.served.recipe, self.chosen.python
        found = {"python": f"{python.path} ({python.version})"}
        return {**found, "recipe": f"{recipe.model} ({fingerprint(recipe)})"} if recipe else found

    def _options(self, directory: Path, plan: GpuPlan, port: int) -> EmbedOptions:
        wish, path = self.request.wish, self.chosen.python.path
        names = dict.fromkeys((self.served.title, self.name))
        app = AppOptions(
            service=self.name,
            host=self.host,
            port=port,
            handlers=(),
            python="" if path == sys.executable else path,
            devices=tuple(map(str, plan.indices)) or ("cpu",),
            workers_per_device=wish.workers_per_gpu,
            timeout=wish.timeout,
            max_body_bytes=wish.max_body or DEFAULT_BODY_BYTES,
            cors=wish.cors or (),
            drain_s=round(prepare_app.DRAIN_SHARE * self.terms.limits.stop_timeout_s, 3),
            access_log=self.request.access_log,
        )
        return EmbedOptions(
            app=app,
            model=str(directory),
            names=tuple(name for name in names if not name.startswith("-")),
            **{name: value for name in _OF_MODEL if (value := getattr(wish, name)) is not None},
        )


_OF_MODEL = (
    "dimensions",
    "dtype",
    "batch_tokens",
    "max_length",
    "attention",
    "compile",
    "truncate",
    "token_ids",
    "instruction",
)
"""What EmbedWish and EmbedOptions call the same."""

_WORK_METRICS = ("mdeploy_inference_total",)


@dataclass(frozen=True, slots=True)
class PoolingDraft(LlmDraft):
    """An embedding model with vLLM for an engine: for one that needs several GPUs."""

    request: EmbedRequest

    def weigh(self, directory: Path | None) -> Weights:
        """See `Draft`."""
        found = LlmDraft.weigh(self, directory)
        return dataclasses.replace(found, checkpoint=_weighed(self.request, self.model, directory).checkpoint)

    def spec(self, settings: Settings, weights: Weights, plan: GpuPlan | None, port: int) -> ServiceSpec:
        """See `Draft`."""
        found = LlmDraft.spec(self, settings, weights, plan, port)
        path, body = _question(weights.checkpoint, self.name)
        return dataclasses.replace(
            found,
            kind=self.request.kind,
            argv=(*found.argv, *_pooling_words(weights.checkpoint)),
            probe=dataclasses.replace(found.probe, request_path=path, request_body=body),
        )


def _pooling_words(model: Checkpoint | None) -> tuple[str, ...]:
    """Flags that make vLLM embed; a vector can be cut only where it is told to which sizes."""
    if model is None or model.smallest is None:
        return ("--runner", "pooling")
    sizes = [size for size in (2**power for power in range(5, 17)) if model.smallest <= size < model.dim]
    overrides = f'{{"is_matryoshka":true,"matryoshka_dimensions":[{",".join(map(str, [*sizes, model.dim]))}]}}'
    return ("--runner", "pooling", "--hf-overrides", overrides)


def _question(model: Checkpoint | None, name: str) -> tuple[str, dict[str, Any]]:
    """A small request that the service must really answer: its path and body."""
    if model and model.kind == "cross-encoder":
        return "/v1/rerank", {"model": name, "query": "Hi", "documents": ["Hello"]}
    return "/v1/embeddings", {"model": name, "input": "Hi"}


# what is looked up


def draft(settings: Settings, request: EmbedRequest) -> Draft:
    """Look everything up that needs no download. Raises what is wrong with the request."""
    wanted = dataclasses.replace(request.wanted, kinds=recipes.EMBEDDING)
    model = resolve.understand(settings.paths, wanted)
    if model.recipe is not None:
        request = _with_recipe(request, model.recipe)
    else:
        _check_backend(request.wish)
    wishes.check(request.wish)
    env = _environment(request.terms, model)
    if request.wish.backend == "vllm":
        return _pooling(settings, request, model, env)
    prepare_app.check_installed(_EDGE_MODULES)
    terms = request.terms
    name, host, key = drafts.settled(settings, terms, resolve.name_of(model.title))
    packages = _PACKAGES_OF[request.kind]
    chosen = interpreters.choose(settings.paths, request.wish.python, terms.base, packages, "embed")
    return EmbedDraft(terms, name, host, key, model, request, model, chosen, env)


def _check_backend(wish: EmbedWish) -> None:
    """What a user says must go with the backend; a recipe may say what both know."""
    if wish.backend not in (None, "mdeploy", "vllm"):
        wishes.check(wish)
    foreign = wishes.foreign_to_backend(wish)
    if foreign:
        flags = ", ".join("flags after --" if name == "args" else f"--{name.replace('_', '-')}" for name in foreign)
        hint = "leave it out, or say --backend mdeploy" if wish.backend == "vllm" else "add --backend vllm"
        do = "do" if len(foreign) > 1 or "args" in foreign else "does"
        raise UsageError(f"{flags} {do} not go with the backend {wish.backend or 'mdeploy'}", hint=hint)


def _with_recipe(request: EmbedRequest, recipe: ModelRecipe) -> EmbedRequest:
    if not isinstance(recipe, EmbedRecipe) or recipe.kind != request.kind:
        hint = f"mdeploy serve {recipe.kind} {request.wanted.model or recipe.model}"
        raise ConfigError(f"{recipe.model} is a model of kind {recipe.kind}, not {request.kind}", hint=hint)
    wish = wishes.joined(request.wish, wishes.of_model_recipe(recipe))
    _check_backend(dataclasses.replace(request.wish, backend=wish.backend))
    return dataclasses.replace(request, wish=wish)


def _environment(terms: Terms, model: Model) -> dict[str, str]:
    """Variables for the service: what tunes its libraries where it is served from, the recipe's, the user's own."""
    tuning = settings.tuning(_TUNING, cwd=terms.base)
    hidden = drafts.secret_names(tuning)
    named = {**(model.recipe.env if model.recipe else {}), **terms.env}
    drafts.check_environment("env", named, "export it before you start the service: it is inherited")
    own = drafts.device_names(named)
    if own:
        raise UsageError(f"{', '.join(own)} is set by mdeploy", hint="name devices with --gpus 0,1")
    return {**{name: value for name, value in tuning.items() if name not in hidden}, **named}


def _weighed(request: EmbedRequest, model: Model, directory: Path | None) -> Weights:
    """The checkpoint in a directory, if it is there already, held against what is wished. Raises what is wrong."""
    if directory is None or not directory.exists():
        return Weights(directory)
    found = checkpoint.read(directory)
    is_gme = found.kind == "gme"
    if is_gme != (request.kind == "gme"):
        kind = "gme" if is_gme else "embed"
        text = f"{model.title} is {'a GME model' if is_gme else 'no GME model'} ({found.architecture})"
        raise ConfigError(text, hint=f"mdeploy serve {kind} {model.source}")
    _check_sizes(request.wish, found, model.title)
    return Weights(directory, checkpoint=found)


def _check_sizes(wish: EmbedWish, model: Checkpoint, title: str) -> None:
    size, length = wish.dimensions, wish.max_length
    if wish.instruction is not None and model.query_prompt is None and model.kind != "gme":
        raise UsageError(f"--instruction: {title} was not trained to follow any", hint="leave it out")
    if length is not None and length > model.max_length:
        text = f"--max-length {length}: {title} was made for {model.max_length} tokens"
        raise UsageError(text, hint=f"--max-length {model.max_length}")
    if size is None:
        return
    if model.kind == "cross-encoder":
        raise UsageError(f"--dimensions {size}: {title} gives scores, no vectors", hint="leave it out")
    least = model.dim if model.smallest is None else model.smallest
    if not least <= size <= model.dim:
        span = f"from {least} to {model.dim}" if least < model.dim else f"{model.dim} and cannot be cut"
        near = least if size < least else model.dim
        raise UsageError(f"--dimensions {size}: vectors of {title} have {span}", hint=f"--dimensions {near}")


def _pooling(settings: Settings, request: EmbedRequest, model: Model, env: Mapping[str, str]) -> PoolingDraft:
    wish = request.wish
    if isinstance(wish.gpus, str):
        raise UsageError(f"--gpus {wish.gpus} does not go with --backend vllm", hint="--gpus 0,1, or --tp 2")
    options = LlmOptions(
        tp=wish.tp,
        gpus=wish.gpus,
        max_model_len=None if wish.max_length is None else str(wish.max_length),
        dtype=wish.dtype,
        extra=wish.args or (),
        gpu_count=wish.gpu_count,
    )
    wanted = dataclasses.replace(request.wanted, kinds=recipes.EMBEDDING)
    terms = dataclasses.replace(request.terms, env=env)
    found = prepare_llm.draft(settings, prepare_llm.LlmRequest(wanted, options, terms, wish.engine))
    return PoolingDraft(terms, found.name, found.host, found.key, model, found.wish, found.engine, found.extra, request)
