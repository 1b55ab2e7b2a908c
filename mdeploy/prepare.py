"""From what a user asked for to a spec that can run, whatever kind of service it is.

Steps, so that many services can be checked before any of them is touched: `draft` looks up all that is quick,
`fetch` brings the model, `place` chooses devices and a port beside the neighbours, `save` writes it down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdeploy import credentials, dispatch, prepare_app, prepare_embed, prepare_llm, reservations, weights
from mdeploy.credentials import Key
from mdeploy.drafts import Draft, Weights
from mdeploy.errors import MdeployError
from mdeploy.paths import Paths
from mdeploy.prepare_app import AppRequest
from mdeploy.prepare_embed import EmbedRequest
from mdeploy.prepare_llm import LlmRequest
from mdeploy.reservations import Neighbours
from mdeploy.settings import Settings
from mdeploy.specs import Say, ServiceSpec
from mdeploy.supervise import state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.state import ServiceFiles

if TYPE_CHECKING:
    from mdeploy.hub.client import Progress

Request = LlmRequest | AppRequest | EmbedRequest


def prepare(settings: Settings, request: Request, *, dry_run: bool, progress: Progress | None, say: Say) -> ServiceSpec:
    """Everything between a command line and a spec: look up, check, download, plan, render, save.

    What is quick to refuse is refused before a download. With `dry_run` nothing is fetched or
    written, and a model that is not there is planned without its facts. The service's GPUs and
    port stay claimed for as long as this process lives.
    """
    asked = draft(settings, request)
    files = ServiceFiles(settings.paths, asked.name)
    if not dry_run:
        _check_free(files, asked.host, asked.terms.port)
    found = fetch(settings, asked, dry_run=dry_run, progress=progress, say=say)
    if asked.key and asked.key.is_kept:
        say(f"{asked.name} asks for the key it has; without one: mdeploy keys rm {asked.name}")
    if dry_run:
        return place(settings, asked, found, reservations.neighbours(settings.paths, [asked.name]))
    with reservations.locked(settings.paths):
        spec = place(settings, asked, found, reservations.neighbours(settings.paths, [asked.name]))
        reservations.claim(settings.paths, spec)
        save(settings, spec, asked.key)
    return spec


def draft(settings: Settings, request: Request) -> Draft:
    """Look everything up that needs no download. Raises what is wrong with the request."""
    if isinstance(request, LlmRequest):
        return prepare_llm.draft(settings, request)
    if isinstance(request, EmbedRequest):
        return prepare_embed.draft(settings, request)
    return prepare_app.draft(settings, request)


def fetch(settings: Settings, asked: Draft, *, dry_run: bool, progress: Progress | None, say: Say) -> Weights:
    """The model on this disk, downloaded where it is not; with `dry_run` only said to be missing."""
    if asked.model is None:
        return asked.weigh(None)
    return asked.weigh(weights.fetched(settings, asked.model, dry_run=dry_run, progress=progress, say=say))


def place(
    settings: Settings, asked: Draft, found: Weights, others: Neighbours, before: ServiceSpec | None = None
) -> ServiceSpec:
    """The spec of a service beside its neighbours; what nobody named stays as it was `before`, where it can.

    Raises DoesNotFitError without GPUs that nobody has, ConfigError without a port.
    """
    chosen = asked.plan(found, others, reservations.gpus_of(before) if before else ())
    port = asked.terms.port or _port(settings.paths, asked, others, before)
    return asked.spec(settings, found, chosen, port)


def save(settings: Settings, spec: ServiceSpec, key: Key | None) -> None:
    """Write a spec and its key down, so that `mdeploy run NAME` has all it needs; never under a running service.

    Raises MdeployError where `mdeploy keys` changes the keys now, or has given it one since it was asked for none.
    """
    paths, name = settings.paths, spec.name
    files = ServiceFiles(paths, name)
    with credentials.locked(paths, name), files.locked():
        if not spec.secrets and credentials.key_file(paths, name).exists():
            raise MdeployError(f"{name} has got a key meanwhile", hint="run it again; it will ask for that key")
        credentials.keep(paths, name, key)
        dispatch.write_spec(files, spec)


def _check_free(files: ServiceFiles, host: str, port: int | None) -> None:
    if files.is_supervised():
        raise state.already_running(files.name)
    if port is not None:
        check_port(host, port)


def _port(paths: Paths, asked: Draft, others: Neighbours, before: ServiceSpec | None) -> int:
    if before and before.port not in others.ports:
        runs = ServiceFiles(paths, asked.name).is_supervised()
        if runs or reservations.can_listen(asked.host, before.port):
            return before.port
    return reservations.free_port(asked.host, others)
