"""The one room that touches the ModelScope SDK: quiet, cancellable, its errors in our words.

Only public names of `modelscope_hub` are used, and only inside functions: importing it takes
a third of a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from mdeploy.errors import MdeployError
from mdeploy.hub import store
from mdeploy.hub.listing import RepoFile, denied, is_loopback, safe_path, shown, unreachable
from mdeploy.specs import ModelRef

if TYPE_CHECKING:
    from modelscope_hub import HubApi, ProgressCallback

# Read by the SDK when it is imported. Its own limits are 3600 s for a whole file and 600 s for
# another process's lock, which a 40 GB shard on a slow line exceeds; a stalled line is noticed
# by its minimum rate (1 KiB/s over 60 s) all the same.
_PATIENCE = {
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(7 * 86400),
    "MODELSCOPE_DOWNLOAD_FILE_LOCK_TIMEOUT_SECONDS": str(7 * 86400),
}
_HOMES = ("modelscope.cn", "modelscope.ai")


class Progress(Protocol):
    """Who wants to see a download move. Called from several threads; must not raise."""

    def begin(self, files: int, total: int, done: int) -> None:
        """A transfer starts: number of files, bytes of all of them, bytes already here."""

    def advance(self, count: int) -> None:
        """`count` more bytes are here; negative where a file starts over."""

    def end(self) -> None:
        """The transfer is over, well or not."""


class Silent:
    """Progress nobody watches."""

    def begin(self, files: int, total: int, done: int) -> None:
        """Nothing to show."""

    def advance(self, count: int) -> None:
        """Nothing to show."""

    def end(self) -> None:
        """Nothing to show."""


def login_token(endpoint: str) -> str | None:
    """The token `modelscope login` stored; for ModelScope's own sites only, no mirror gets to see it."""
    host = urlsplit(endpoint).hostname or ""
    if not any(host == home or host.endswith(f".{home}") for home in _HOMES):
        return None
    with _settled(endpoint):
        from modelscope_hub import HubConfig

        return HubConfig(endpoint=endpoint, token="").load_token()


def walk(ref: ModelRef, endpoint: str, token: str | None, cache_dir: Path) -> tuple[RepoFile, ...]:
    """All files of a model whose listing the hub cut off, asked for directory by directory."""
    from modelscope_hub import HubError

    with _settled(endpoint):
        try:
            found = _api(endpoint, token, cache_dir).list_repo_files(ref.id, "model", revision=ref.revision)
        except HubError as error:
            raise unreachable(endpoint, f"the listing broke off: {_headline(error)}") from error
    return tuple(RepoFile(safe_path(file.path), file.size, file.sha256) for file in found if not file.is_dir)


def transfer(
    ref: ModelRef,
    files: tuple[RepoFile, ...],
    target: Path,
    cache_dir: Path,
    endpoint: str,
    token: str | None,
    progress: Progress,
) -> int:
    """Bring every file to `target`, verified by its hash; the bytes that went over the wire are returned.

    The SDK gives a file five tries, however far each of them came; here a transfer goes on for as
    long as rounds bring bytes. Raises MdeployError and its kinds, and KeyboardInterrupt once all
    threads have ended.
    """
    meter = _Meter(target, store.present(files, target), progress)
    with _settled(endpoint):
        from modelscope_hub import FileDownloadError, HubError

        api, callbacks = _api(endpoint, token, cache_dir), [_callback(meter)]
        while files:
            before = store.progress_on_disk(files, target)
            try:
                api.download_repo(
                    ref.id,
                    "model",
                    revision=ref.revision,
                    cache_dir=cache_dir,
                    local_dir=target,
                    progress_callbacks=callbacks,
                    file_list=[_entry(file) for file in files],
                )
                break
            except FileDownloadError as error:
                failed = error.failed_files
                if not _line_broke(failed) or store.progress_on_disk(files, target) <= before:
                    raise _explain(failed, ref, endpoint, target) from error
                files = tuple(file for file in files if file.path in failed)
            except HubError as error:
                raise unreachable(endpoint, _headline(error)) from error
            except OSError as error:
                raise store.storage_error(error, target) from error
    return meter.fetched


class _Meter:
    """Counts bytes of all files. The SDK reports resumed bytes like fetched ones; here they are told apart."""

    def __init__(self, target: Path, present: Mapping[str, int], progress: Progress) -> None:
        self.target = target
        self.fetched = 0
        self._counted = dict(present)
        self._progress = progress
        self._lock = threading.Lock()

    def opened(self, path: str) -> int:
        """A file starts (again); returns the bytes of it that can be resumed."""
        store.mark(self.target)
        with self._lock:
            counted = self._counted.pop(path, 0)
        self._progress.advance(-counted)
        partial = store.partial_path(self.target, path)
        return partial.stat().st_size if partial.exists() else 0

    def moved(self, path: str, count: int, fetched: int) -> None:
        """`count` bytes of a file are newly on disk (negative: gone), `fetched` of them came by wire."""
        with self._lock:
            self._counted[path] = self._counted.get(path, 0) + count
            self.fetched += fetched
        self._progress.advance(count)


def _callback(meter: _Meter) -> type[ProgressCallback]:
    """The class the SDK wants: it makes one instance a file and attempt."""
    from modelscope_hub import ProgressCallback

    class Callback(ProgressCallback):
        def __init__(self, filename: str, file_size: int) -> None:
            super().__init__(filename, file_size)
            self._resumed = meter.opened(filename)

        def update(self, size: int) -> None:
            resumed = self._resumed == size
            self._resumed = 0
            meter.moved(self.filename, size, 0 if resumed or size < 0 else size)

    return Callback


def _api(endpoint: str, token: str | None, cache_dir: Path) -> HubApi:
    from modelscope_hub import HubApi, HubConfig

    return HubApi(config=HubConfig(endpoint=endpoint, token=token or "", cache_dir=cache_dir))


def _entry(file: RepoFile) -> dict[str, object]:
    return {"Path": file.path, "Type": "blob", "Size": file.size, "Sha256": file.sha256}


@contextlib.contextmanager
def _settled(endpoint: str) -> Iterator[None]:
    """An environment in which the SDK is silent, patient and finds this machine; the old one comes back."""
    wanted = {**{name: os.environ.get(name, value) for name, value in _PATIENCE.items()}, "TQDM_DISABLE": "1"}
    if is_loopback(endpoint):
        wanted |= _past_proxies(urlsplit(endpoint).hostname or "")
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    import modelscope_hub

    logger = logging.getLogger(modelscope_hub.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _past_proxies(host: str) -> dict[str, str]:
    """requests takes the lower-case name first, and `*` only where it stands alone."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    value = "*" if known.strip() == "*" else ",".join(filter(None, (known, host)))
    return {"no_proxy": value, "NO_PROXY": value}


def _line_broke(failed: Mapping[str, BaseException]) -> bool:
    """Whether nothing but the network stands in the way, so that another round may help."""
    from modelscope_hub import NetworkError, RateLimitError, ServerError

    return all(isinstance(error, (NetworkError, RateLimitError, ServerError)) for error in failed.values())


def _explain(failed: Mapping[str, BaseException], ref: ModelRef, endpoint: str, target: Path) -> MdeployError:
    """The error of the file that says most: the disk first, then rights, then content, then the line."""
    from modelscope_hub import AuthenticationError, FileIntegrityError, HubError, NotExistError, PermissionDeniedError

    def first(*kinds: type[BaseException], but: type[BaseException] | None = None) -> tuple[str, BaseException] | None:
        found = ((p, e) for p, e in failed.items() if isinstance(e, kinds) and not (but and isinstance(e, but)))
        return next(found, None)

    if (found := first(OSError, but=HubError)) and isinstance(found[1], OSError):
        return store.storage_error(found[1], target / found[0])
    if found := first(AuthenticationError, PermissionDeniedError):
        return denied(ref, endpoint, getattr(found[1], "status_code", None) or 403)
    if found := first(FileIntegrityError):
        return MdeployError(
            f"{found[0]} of {ref} kept arriving with other bytes than {shown(endpoint)} lists, and was discarded",
            hint="the hub or a cache on the way is damaged: try later, or another hub with --endpoint",
        )
    if found := first(NotExistError):
        return MdeployError(f"{shown(endpoint)} lists {found[0]} in {ref} but does not have it", hint="try again later")
    path, error = next(iter(failed.items()))
    return unreachable(endpoint, f"{len(failed)} of the files did not arrive, {path}: {_headline(error)}")


def _headline(error: BaseException) -> str:
    """The root of a chain in one line: the SDK's own sentences are long, may be Chinese or hold signed URLs."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next(iter(str(error).splitlines()), "")
    system = re.search(r"\[Errno -?\d+\] [^'\")]+", text)
    short = system.group() if system else re.sub(r" with url: \S+", "", text)[:200]
    return f"{type(error).__name__}: {short}" if short else type(error).__name__
