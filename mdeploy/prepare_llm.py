"""From what a user asked of a language model to a spec: engine, recipe, facts of the checkpoint, plan, command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mdeploy import credentials, drafts, gpus, resolve
from mdeploy.drafts import Draft, Terms, Weights
from mdeploy.engines import store as engine_store
from mdeploy.llm import command, facts, plan
from mdeploy.reservations import Neighbours
from mdeploy.resolve import Model, Wanted
from mdeploy.settings import Settings
from mdeploy.specs import Engine, GpuPlan, LlmOptions, ModelFacts, Probe, Recipe, ServiceSpec, fingerprint

_UNKNOWN_FACTS = ModelFacts("unknown", "auto", 0, None, None, None, None, None, chat_template=False)


@dataclass(frozen=True, slots=True)
class LlmRequest:
    """What an LLM service shall be, before anything is looked up."""

    wanted: Wanted
    wish: LlmOptions = field(default_factory=LlmOptions)
    terms: Terms = field(default_factory=Terms)
    engine: str | None = None


@dataclass(frozen=True, slots=True)
class LlmDraft(Draft):
    """A model with its engine; `extra` are flags of vLLM."""

    model: Model
    wish: LlmOptions
    engine: Engine
    extra: tuple[str, ...]

    def weigh(self, directory: Path | None) -> Weights:
        """See `Draft`."""
        if directory is None or not directory.exists():
            return Weights(directory, _UNKNOWN_FACTS)
        return Weights(directory, facts.read(directory, weights=not command.loads_no_weights(self.extra)))

    def plan(self, weights: Weights, others: Neighbours, before: tuple[int, ...]) -> GpuPlan:
        """See `Draft`."""
        known = weights.facts or _UNKNOWN_FACTS
        recipe = self.model.recipe if isinstance(self.model.recipe, Recipe) else None
        if self.engine.variant == "cuda":
            allowed = drafts.allowed_gpus(named=bool(self.wish.gpus))
            return plan.plan_cuda(known, self.wish, recipe, allowed, others.gpus, before)
        import psutil

        cores = len(os.sched_getaffinity(0))
        free_bytes = max(0, psutil.virtual_memory().available - others.memory)
        return plan.plan_cpu(known, self.wish, recipe, cores, free_bytes)

    def spec(self, settings: Settings, weights: Weights, plan: GpuPlan | None, port: int) -> ServiceSpec:
        """See `Draft`."""
        assert plan is not None
        assert weights.directory is not None
        terms, title, name = self.terms, self.model.title, self.name
        names = tuple(n for n in dict.fromkeys((title, name)) if not n.startswith("-"))
        drain_s = terms.limits.stop_timeout_s
        body = {"model": name, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
        recipe_env = self.model.recipe.env if self.model.recipe else {}
        secrets = credentials.secrets_of(settings.paths, name, of_vllm=True) if self.key else {}
        return ServiceSpec(
            name=name,
            kind="llm",
            argv=command.argv(self.engine, weights.directory, names, self.host, port, plan, self.extra, drain_s),
            env={**command.environment(plan), **recipe_env, **terms.env},
            cwd=str(settings.paths.service(name)),
            host=self.host,
            port=port,
            probe=Probe(
                "/health", "/v1/completions", body, bearer=next(iter(secrets), None), work_metrics=command.WORK_METRICS
            ),
            model=name if title.startswith("-") else title,
            source=self.model.source,
            plan=plan,
            secrets=secrets,
            limits=terms.limits,
            restart=terms.restart,
            depends_on=terms.depends_on,
        )

    def stands_for(self) -> Mapping[str, str]:
        """See `Draft`."""
        recipe = self.model.recipe
        found = {"engine": f"{self.engine.name} ({self.engine.version})"}
        return {**found, "recipe": f"{recipe.model} ({fingerprint(recipe)})"} if recipe else found


def draft(settings: Settings, request: LlmRequest) -> LlmDraft:
    """Look everything up that needs no download. Raises what is wrong with the request."""
    model = resolve.understand(settings.paths, request.wanted)
    name, host, key = drafts.settled(settings, request.terms, resolve.name_of(model.title))
    engine = engine_store.find(settings.paths.engines, request.engine or settings.get("engine"), _has_gpu)
    extra = (*(model.recipe.args if model.recipe else ()), *request.wish.extra)
    command.check_extra(extra, command.known_flags(engine.python), engine.version)
    if model.recipe:
        hint = "export MDEPLOY_API_KEY instead"
        drafts.check_environment(f"the recipe of {model.recipe.model}", model.recipe.env, hint)
    return LlmDraft(request.terms, name, host, key, model, request.wish, engine, extra)


def _has_gpu() -> bool:
    return bool(gpus.probe())
