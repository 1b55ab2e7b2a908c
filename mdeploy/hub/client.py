"""Downloads a model: ask the hub what there is, let the SDK fetch it, say what came of it."""

from __future__ import annotations

import time
from pathlib import Path

from mdeploy.errors import UnavailableError
from mdeploy.hub import listing, sdk, store
from mdeploy.hub.listing import Listing
from mdeploy.hub.sdk import Progress
from mdeploy.paths import expand
from mdeploy.specs import LocalModel, ModelRef

__all__ = ["Progress", "download"]


def download(
    ref: ModelRef,
    *,
    cache_dir: Path,
    local_dir: Path | None = None,
    endpoint: str,
    token: str | None = None,
    progress: Progress | None = None,
) -> LocalModel:
    """Bring a model to the ModelScope cache, or to `local_dir`; a complete one is verified, nothing is fetched.

    Resumes what an earlier call left. Raises NotFoundError for a model or revision the hub does not
    have, UnavailableError where it cannot be used, ConfigError for rights (token, directory),
    MdeployError for a full disk or bytes that are not what the hub lists.
    """
    started = time.monotonic()
    endpoint = listing.check_endpoint(endpoint)
    cache_dir = expand(cache_dir)
    token = token or sdk.login_token(endpoint)
    found = _listing(ref, endpoint, token, cache_dir)
    target = expand(local_dir) if local_dir else store.destination(ref, cache_dir)
    fetched = _fetch(ref, found, target, cache_dir, endpoint, token, progress or sdk.Silent())
    total = sum(file.size for file in found.files)
    seconds = time.monotonic() - started
    return LocalModel(ref, str(target), found.commit, len(found.files), total, fetched, seconds)


def _listing(ref: ModelRef, endpoint: str, token: str | None, cache_dir: Path) -> Listing:
    try:
        found = listing.fetch(ref, endpoint, token)
    except UnavailableError as error:
        here = store.locate(ref, cache_dir)
        if here is None:
            raise
        raise UnavailableError(error.message, hint=f"{ref} is already on this machine: {here}") from error
    if not found.truncated:
        return found
    files = sdk.walk(ref, endpoint, token, cache_dir)
    return Listing(files, found.commit)


def _fetch(
    ref: ModelRef,
    found: Listing,
    target: Path,
    cache_dir: Path,
    endpoint: str,
    token: str | None,
    progress: Progress,
) -> int:
    store.check_space(found.files, target)
    here = store.present(found.files, target)
    progress.begin(len(found.files), sum(file.size for file in found.files), sum(here.values()))
    try:
        with store.clean_after_failure(ref, found.files, target, cache_dir):
            return sdk.transfer(ref, found.files, target, cache_dir, endpoint, token, progress)
    finally:
        progress.end()
