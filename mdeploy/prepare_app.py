"""From what a user asked of an app to a spec: recipe, handlers, interpreter, devices, command."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mdeploy import credentials, devices, drafts, recipes, resolve, wishes
from mdeploy.drafts import Draft, Terms, Weights
from mdeploy.errors import ConfigError, DoesNotFitError, NotFoundError, UsageError
from mdeploy.paths import expand
from mdeploy.reservations import Neighbours
from mdeploy.resolve import Model, Wanted
from mdeploy.serving import source
from mdeploy.serving.handler import MODEL_VARIABLE
from mdeploy.serving.options import DEFAULT_BODY_BYTES, AppOptions, ClusterOptions
from mdeploy.serving.source import Interpreter, Source
from mdeploy.settings import Settings
from mdeploy.specs import AppRecipe, AppWish, GpuPlan, Probe, ServiceSpec, fingerprint

DRAIN_SHARE = 0.9
"""Of the time a stop leaves it; the rest is for workers to close their models in."""

_NO_GPU = "nvidia-smi lists no GPU that may be used"
_SECRETS_HINT = "export it before you start the service: it is inherited, and stands in no file"
_MODULES = ("fastapi", "uvicorn", "uvloop", "httptools", "python_multipart", "prometheus_client")


@dataclass(frozen=True, slots=True)
class AppRequest:
    """What an app shall be, before anything is looked up. `recipe` is a file or a name; what is wished for wins."""

    wish: AppWish = field(default_factory=AppWish)
    terms: Terms = field(default_factory=Terms)
    recipe: str | None = None
    model: Wanted | None = None
    reload: bool = False
    cluster: ClusterOptions | None = None


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What the names in a request turned out to be."""

    sources: tuple[Source, ...]
    paths: tuple[str, ...]
    python: Interpreter
    recipe: AppRecipe | None


@dataclass(frozen=True, slots=True)
class AppDraft(Draft):
    """Handlers with their interpreter: what they need to be started but a place."""

    request: AppRequest
    found: LookedUp

    def weigh(self, directory: Path | None) -> Weights:
        """See `Draft`."""
        return Weights(directory)

    def plan(self, weights: Weights, others: Neighbours, before: tuple[int, ...]) -> GpuPlan | None:
        """See `Draft`. A machine without GPUs runs it on the CPU."""
        if self.request.cluster is not None:
            return None
        return on_devices(self.request.wish.gpus, self.request.wish.gpu_count, others, before)

    def spec(self, settings: Settings, weights: Weights, plan: GpuPlan | None, port: int) -> ServiceSpec:
        """See `Draft`."""
        terms = self.terms
        secrets = credentials.secrets_of(settings.paths, self.name, of_vllm=False) if self.key else {}
        bearer = next(iter(secrets), None)
        shown = ", ".join(one.shown for one in self.found.sources)
        return ServiceSpec(
            name=self.name,
            kind="app",
            argv=(sys.executable, "-m", "mdeploy.apps", "app", *self._options(plan, port).argv()),
            env={**self._environment(weights, plan), **terms.env},
            cwd=str(settings.paths.service(self.name)),
            host=self.host,
            port=port,
            probe=Probe("/health", "/ready", {}, bearer=bearer, work_metrics=("mdeploy_inference_total",)),
            model=self.model.title if self.model else shown,
            source=self.model.source if self.model else shown,
            plan=plan,
            secrets=secrets,
            limits=terms.limits,
            restart=terms.restart,
            reloads=True,
            depends_on=terms.depends_on,
        )

    def stands_for(self) -> Mapping[str, str]:
        """See `Draft`."""
        found = {"python": f"{self.found.python.path} ({self.found.python.version})"}
        for one in self.found.sources:
            content = f" ({fingerprint(one.file.read_text(errors='replace'))})" if one.file else ""
            found[f"handler.{one.shown}"] = f"{one}{content}"
        return {**found, "recipe": fingerprint(self.found.recipe)} if self.found.recipe else found

    def _environment(self, weights: Weights, plan: GpuPlan | None) -> dict[str, str]:
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if plan and plan.device == "cuda" else {}
        recipe_env = self.found.recipe.env if self.found.recipe else {}
        model = {MODEL_VARIABLE: str(weights.directory)} if weights.directory else {}
        return {**order, **recipe_env, **model}

    def _options(self, plan: GpuPlan | None, port: int) -> AppOptions:
        wish = self.request.wish
        return AppOptions(
            service=self.name,
            host=self.host,
            port=port,
            handlers=tuple(map(str, self.found.sources)),
            paths=self.found.paths,
            python="" if self.found.python.path == sys.executable else self.found.python.path,
            devices=tuple(map(str, plan.indices)) if plan and plan.indices else ("cpu",),
            workers_per_device=wish.workers_per_gpu,
            max_batch_size=wish.batch,
            max_batch_cost=wish.batch_cost,
            max_wait_ms=wish.max_wait_ms,
            timeout=wish.timeout,
            queue_size=wish.queue,
            max_body_bytes=wish.max_body or DEFAULT_BODY_BYTES,
            cors=wish.cors or (),
            drain_s=round(DRAIN_SHARE * self.terms.limits.stop_timeout_s, 3),
            reload=self.request.reload,
            config=wishes.overrides(wish),
            cluster=self.request.cluster,
        )


def on_devices(
    wished: tuple[int, ...] | Literal["all", "none"] | None,
    count: int | None,
    others: Neighbours,
    before: tuple[int, ...],
) -> GpuPlan:
    """A plan for the devices wished for (`gpus` and `gpu_count` of AppWish), else for the freest GPU, else the CPU.

    Raises DoesNotFitError for GPUs that are not there, or that others have.
    """
    if wished == "none":
        return _on_cpu("as wished: on the CPU")
    present = drafts.allowed_gpus(named=isinstance(wished, tuple))
    if not present and wished is None and count is None:
        return _on_cpu(f"{_NO_GPU}: on the CPU")
    if isinstance(wished, tuple):
        devices.check_present(present, wished)
        return _on_gpus(wished, devices.as_wished(wished, others.gpus), named=True)
    wanted = len(present) if wished == "all" else count or 1
    if not present or wanted > len(present):
        text = f"{wanted} GPUs needed, this machine has {len(present)}" if present else _NO_GPU
        raise DoesNotFitError(text, hint="--gpus none runs it on the CPU")
    chosen, why = devices.choose(present, wanted, others.gpus, before)
    return _on_gpus(chosen, why, named=False)


def _on_cpu(why: str) -> GpuPlan:
    return GpuPlan("cpu", (), 1, None, None, None, reasons=(why,))


def _on_gpus(indices: tuple[int, ...], why: str, *, named: bool) -> GpuPlan:
    reasons = (f"GPU {', '.join(map(str, indices))}: {why}",)
    return GpuPlan("cuda", indices, 1, None, None, None, named=named, reasons=reasons)


def draft(settings: Settings, request: AppRequest) -> AppDraft:
    """Look everything up that needs no download. Raises what is wrong with the request."""
    check_installed()
    file, recipe = _recipe(settings, request)
    request = _with_recipe(request, recipe, file.parent) if recipe and file else request
    wish, terms = request.wish, request.terms
    wishes.check(wish)
    _check_together(request)
    env = {**(recipe.env if recipe else {}), **terms.env}
    drafts.check_environment("env", env, _SECRETS_HINT)
    sources = tuple(source.understand(text, terms.base) for text in wish.handlers or ())
    if not sources:
        raise UsageError("no handler is named", hint="mdeploy serve app FILE.py:Class")
    name, host, key = drafts.settled(settings, terms, resolve.name_of(_title(sources, file)))
    paths = source.search_path(sources, wish.paths or (), terms.base)
    python = source.check(source.interpreter(wish.python, terms.base), sources, paths)
    looked_up = LookedUp(sources, paths, python, recipe)
    model = resolve.understand(settings.paths, request.model) if request.model else None
    if request.cluster is not None:
        request, model = dataclasses.replace(request, cluster=_in_cluster(request.cluster, model, env)), None
    return AppDraft(terms, name, host, key, model, request, looked_up)


def _in_cluster(cluster: ClusterOptions, model: Model | None, env: Mapping[str, str]) -> ClusterOptions:
    """What replicas have to be told: each node has the model in a place of its own, so it is only named."""
    named = str(model.ref or model.directory) if model else ""
    return dataclasses.replace(cluster, model=named, variables=",".join(sorted(env)))


def check_installed(more: Sequence[str] = ()) -> None:
    """Raise ConfigError where our own environment lacks what serves apps, or `more` modules."""
    missing = [name for name in (*_MODULES, *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"to serve apps mdeploy lacks {', '.join(missing)}", hint="pip install 'mdeploy[serve]'")


def _recipe(settings: Settings, request: AppRequest) -> tuple[Path | None, AppRecipe | None]:
    """The file of the recipe that is named, and what it says. Raises NotFoundError."""
    text, base = request.recipe, request.terms.base
    if text is None:
        return None, None
    if text.endswith((".yaml", ".yml")):
        path = expand(text, base)
        return path, recipes.load_app(path)
    found = recipes.find_app(text, recipes.directories(settings.paths, base or Path.cwd()))
    if found is None:
        raise NotFoundError(f"no recipe {text!r}", hint="name its file (.yaml)")
    return found, recipes.load_app(found)


def _with_recipe(request: AppRequest, recipe: AppRecipe, base: Path) -> AppRequest:
    wish = wishes.joined(request.wish, wishes.of_recipe(recipe, base))
    model = request.model or (Wanted(recipe.model, recipe.revision, base=base) if recipe.model else None)
    return dataclasses.replace(request, wish=wish, model=model)


def _check_together(request: AppRequest) -> None:
    wish = request.wish
    own = drafts.device_names(request.terms.env)
    if own:
        raise UsageError(f"{', '.join(own)} is set by mdeploy", hint="name devices with --gpus 0,1")
    if request.cluster is None:
        return
    for flag, is_set in (("--reload", request.reload), ("--python", wish.python), ("--gpus", wish.gpus)):
        if is_set:
            raise UsageError(f"{flag} does not go with --cluster", hint="replicas run in the cluster's own environment")


def _title(sources: Sequence[Source], file: Path | None) -> str:
    """What the service is called where nobody says it: its recipe, its only handler, or the first file."""
    if file is None:
        return sources[0].title
    return file.parent.name if file.stem in ("recipe", "app") else file.stem
