"""One mdeploy.yaml, read and checked: the services it declares, in the order they must start in."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from mdeploy import prepare
from mdeploy.drafts import Terms
from mdeploy.errors import NotFoundError
from mdeploy.fleet import checks, document, schema
from mdeploy.fleet.document import Mistake
from mdeploy.fleet.schema import GpusEntry, LifecycleEntry, LimitsEntry, ModelEntry, ServiceEntry
from mdeploy.paths import expand
from mdeploy.prepare_app import AppRequest
from mdeploy.prepare_embed import EmbedRequest
from mdeploy.prepare_llm import LlmRequest
from mdeploy.resolve import Wanted
from mdeploy.settings import Settings
from mdeploy.specs import Limits, LlmOptions


@dataclass(frozen=True, slots=True)
class Service:
    """One declared service, defaults included; `where` is what messages about it begin with."""

    name: str
    entry: ServiceEntry
    where: str

    @property
    def depends_on(self) -> tuple[str, ...]:
        """The services that must be ready first, each once."""
        return tuple(dict.fromkeys(self.entry.depends_on or ()))


@dataclass(frozen=True, slots=True)
class Fleet:
    """The services of one file, each after those it depends on."""

    path: Path
    shown: str
    services: tuple[Service, ...]

    def names(self) -> tuple[str, ...]:
        """All names, in the order of starting."""
        return tuple(service.name for service in self.services)

    def with_dependencies(self, wanted: Collection[str]) -> tuple[Service, ...]:
        """The services named and what they need, in the order of starting; all of them where none is named."""
        self._check(wanted)
        needed = set(wanted or self.names())
        for service in reversed(self.services):
            needed |= set(service.depends_on) if service.name in needed else set()
        return tuple(service for service in self.services if service.name in needed)

    def with_dependents(self, wanted: Collection[str]) -> tuple[Service, ...]:
        """The services named and what needs them, in the order of stopping."""
        self._check(wanted)
        needing = set(wanted or self.names())
        for service in self.services:
            needing |= {service.name} if needing & set(service.depends_on) else set()
        return tuple(service for service in reversed(self.services) if service.name in needing)

    def _check(self, wanted: Iterable[str]) -> None:
        unknown = [name for name in wanted if name not in self.names()]
        if unknown:
            hint = f"it has {', '.join(self.names())}"
            raise NotFoundError(f"{self.shown} has no service {', '.join(unknown)}", hint=hint)


def load(settings: Settings, path: Path) -> Fleet:
    """Read a file. Raises ConfigError that lists every mistake with its line, NotFoundError without a file."""
    read = document.read(path, str(path))
    parsed, shape = schema.parse(read)
    later = checks.check(read, parsed, settings.require("host")) if parsed else ()
    earlier = [*read.mistakes, *shape]
    mistakes = [*earlier, *(m for m in later if not _repeats(m, earlier))]
    if mistakes or parsed is None:
        raise read.error(mistakes)
    entries = {name: checks.effective(parsed.defaults, own) for name, own in parsed.services.items()}
    services = (Service(name, entries[name], _where(read, name)) for name in checks.order(entries))
    return Fleet(expand(path), str(path), tuple(services))


def _repeats(mistake: Mistake, earlier: Iterable[Mistake]) -> bool:
    """True where a value is complained of only because it, or a part of it, was left out as wrong."""
    at = mistake.at
    return any(other.at == at or (len(at) > 2 and other.at[: len(at)] == at) for other in earlier)


def _where(read: document.Document, name: str) -> str:
    return f"{read.file}:{read.line(('services', name))}: services.{name}"


def request(service: Service, path: Path) -> prepare.Request:
    """What `serve` would have been asked for this service; relative paths start at the file."""
    entry = service.entry
    terms = Terms(
        name=service.name,
        host=entry.host,
        port=entry.port,
        insecure=bool(entry.insecure),
        env=entry.env or {},
        limits=_limits(entry.limits or LimitsEntry(), entry.lifecycle or LifecycleEntry()),
        restart=(entry.lifecycle and entry.lifecycle.restart) or "on-failure",
        depends_on=service.depends_on,
        key=entry.auth.key if entry.auth else None,
        base=path.parent,
    )
    if entry.kind == "app":
        model = _wanted(entry.model, None, path.parent) if entry.model else None
        return AppRequest(entry.app_wish(), terms, entry.recipe, model)
    wanted = _wanted(entry.model or ModelEntry(), entry.recipe, path.parent)
    if entry.kind == "embed" or entry.kind == "gme":
        return EmbedRequest(entry.kind, wanted, entry.embed_wish(), terms)
    return LlmRequest(wanted, _llm_wish(entry, entry.gpus or GpusEntry()), terms, entry.engine)


def _wanted(model: ModelEntry, recipe: str | None, base: Path) -> Wanted:
    source = None if model.source == "modelscope" else model.source
    return Wanted(model.id or "", model.revision, recipe, source, base)


def _llm_wish(entry: ServiceEntry, gpus: GpusEntry) -> LlmOptions:
    return LlmOptions(
        tp=entry.tp,
        gpus=gpus.ids,
        gpu_count=gpus.count,
        gpu_memory_utilization=entry.gpu_memory_utilization,
        max_model_len=entry.max_model_len,
        dtype=entry.dtype,
        extra=entry.args or (),
    )


def _limits(limits: LimitsEntry, life: LifecycleEntry) -> Limits:
    usual = Limits()
    return Limits(
        start_timeout_s=usual.start_timeout_s if life.ready_timeout is None else life.ready_timeout,
        stop_timeout_s=usual.stop_timeout_s if life.drain is None else life.drain,
        log_bytes=usual.log_bytes if limits.log_bytes is None else limits.log_bytes,
        log_files=usual.log_files if limits.log_files is None else limits.log_files,
    )
