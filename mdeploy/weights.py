"""A model's files on this disk: where they are or would be, and how they get there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdeploy.paths import expand
from mdeploy.resolve import Model
from mdeploy.settings import Settings
from mdeploy.specs import LocalModel, ModelRef, Say

if TYPE_CHECKING:
    from mdeploy.hub.client import Progress


def download(
    settings: Settings, ref: ModelRef, *, local_dir: Path | None = None, progress: Progress | None = None
) -> LocalModel:
    """Fetch a model with the hub, cache and token the settings name."""
    from mdeploy.hub import client

    return client.download(
        ref,
        cache_dir=expand(settings.require("cache_dir")),
        local_dir=local_dir,
        endpoint=settings.require("endpoint"),
        token=settings.get("token"),
        progress=progress,
    )


def directory_of(settings: Settings, model: Model) -> Path:
    """Where a model is, or would be once it is downloaded."""
    named = model.directory or model.local_dir
    if named is not None:
        return named
    from mdeploy.hub import store

    assert model.ref is not None
    cache = expand(settings.require("cache_dir"))
    return store.locate(model.ref, cache) or store.snapshot_dir(model.ref, cache)


def fetched(settings: Settings, model: Model, *, dry_run: bool, progress: Progress | None, say: Say) -> Path:
    """Where a model is, downloaded if it was not there; with `dry_run` that is only said."""
    directory, ref = directory_of(settings, model), model.ref
    if model.directory is not None or ref is None or (model.local_dir is None and _is_here(settings, ref)):
        return directory
    if dry_run:
        say(f"{ref} is not downloaded yet; a real run would fetch it first")
        return directory
    say(f"{ref} is not here yet: downloading")
    return Path(download(settings, ref, local_dir=model.local_dir, progress=progress).path)


def _is_here(settings: Settings, ref: ModelRef) -> bool:
    from mdeploy.hub import store

    return store.locate(ref, expand(settings.require("cache_dir"))) is not None
