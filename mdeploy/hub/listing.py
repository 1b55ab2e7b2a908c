"""What a hub says is in a model: one request, every answer checked before a byte is written.

The SDK takes an unknown revision (`Files: null` with status 200) for an empty model and a login
page for an empty listing, so the listing is fetched and judged here.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UnavailableError, UsageError
from mdeploy.hub.refs import DEFAULT_REVISION
from mdeploy.specs import ModelRef

if TYPE_CHECKING:
    import httpx

# The hub cuts a listing here and does not say so (REPO_FILES_TRUNCATION_LIMIT of modelscope_hub).
TRUNCATED_AT = 3000
# One wait before each further try at a hub that answers 429 or 5xx, unless it names its own.
_WAITS_S = (0.5, 1.0)
_MAX_RETRY_AFTER_S = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a model: path below its root, bytes, and the hash where the hub knows it."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a model at a revision, and the commit they come from."""

    files: tuple[RepoFile, ...]
    commit: str
    truncated: bool = False


def fetch(ref: ModelRef, endpoint: str, token: str | None = None, *, timeout_s: float = 30.0) -> Listing:
    """Ask the hub at `endpoint` what `ref` holds.

    Raises NotFoundError for an unknown or empty model or revision, UnavailableError for a server
    that cannot be reached or is no hub, ConfigError where it wants another token.
    """
    url = f"{endpoint}/api/v1/models/{ref.id}/repo/files?Revision={quote(ref.revision, safe='')}&Recursive=True"
    with _client(endpoint, token, timeout_s) as client:
        data = _data(_get(client, url, endpoint), ref, endpoint)
        entries = data.get("Files")
        if not isinstance(entries, list) or not entries:
            raise _nothing_there(ref, _revisions(client, ref, endpoint), endpoint)
    files = tuple(_file(entry) for entry in entries if _is_blob(entry))
    if not files:
        raise NotFoundError(f"{ref} holds no files on {shown(endpoint)}")
    return Listing(files, _head(data, entries) or fingerprint(files), len(entries) >= TRUNCATED_AT)


def fingerprint(files: Iterable[RepoFile]) -> str:
    """40 hex digits that name a set of files, for hubs and directories without a commit."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.path):
        digest.update(f"{file.path}\0{file.sha256}\0{file.size}\n".encode())
    return digest.hexdigest()[:40]


def check_endpoint(endpoint: str) -> str:
    """A usable base URL without a trailing slash; https where no scheme is given. Raises UsageError."""
    text = endpoint.strip()
    url = (text if "://" in text else f"https://{text}").rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s?#]", url):
        raise UsageError(f"{endpoint!r} is no hub address", hint="give http://HOST:PORT or https://www.modelscope.cn")
    return url


def is_loopback(endpoint: str) -> bool:
    """Whether the hub is this machine, which no proxy can reach for us."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def shown(endpoint: str) -> str:
    """The endpoint as it may be printed: without user and password."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def safe_path(path: object) -> str:
    """A path from a listing, refused if it could leave the model's directory. Raises MdeployError."""
    if isinstance(path, str) and path and not re.search(r"[\0-\x1f\\]", path):
        parts = PurePosixPath(path)
        if not parts.is_absolute() and ".." not in parts.parts and str(parts) == path:
            return path
    raise MdeployError(
        f"the hub lists a file at {path!r}, which is not inside the model; nothing was downloaded",
        hint="do not use this hub or model: no honest one has such a file",
    )


def _client(endpoint: str, token: str | None, timeout_s: float) -> httpx.Client:
    import httpx

    headers = {"Accept": "application/json"}
    if token:
        headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    try:
        return httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            follow_redirects=True,
            trust_env=not is_loopback(endpoint),
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"the proxy in the environment cannot be used: {error}",
            hint="correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY; for SOCKS: pip install 'httpx[socks]' pysocks",
        ) from error


def _get(client: httpx.Client, url: str, endpoint: str) -> httpx.Response:
    """The answer, tried again for as long as the hub says it is only busy."""
    import httpx

    try:
        for wait in _WAITS_S:
            response = client.get(url)
            if response.status_code != 429 and response.status_code < 500:
                return response
            time.sleep(_retry_after(response.headers, wait))
        return client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise unreachable(endpoint, _reason(error) + _by_proxy(endpoint)) from error


def unreachable(endpoint: str, reason: str) -> UnavailableError:
    """The hub cannot be used now; one wording for listing and transfer."""
    return UnavailableError(
        f"cannot use the hub at {shown(endpoint)}: {reason}",
        hint="check MODELSCOPE_ENDPOINT (or --endpoint) and the network; behind a proxy, HTTPS_PROXY and NO_PROXY",
    )


def denied(ref: ModelRef, endpoint: str, status: int) -> ConfigError:
    """The hub wants a token, or another one."""
    return ConfigError(
        f"{shown(endpoint)} refuses access to {ref.id} (HTTP {status})",
        hint="set MODELSCOPE_API_TOKEN to a token that may read it: https://modelscope.cn/my/myaccesstoken",
    )


def _reason(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.TooManyRedirects):
        return "it redirects in circles"
    return str(error) or type(error).__name__


def _by_proxy(endpoint: str) -> str:
    """Names the proxy in between, whose failures look like the hub's."""
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(endpoint), getproxies()
    proxy = proxies.get(parts.scheme.lower()) or proxies.get("all")
    if not proxy or is_loopback(endpoint) or proxy_bypass(parts.hostname or ""):
        return ""
    return f" (through the proxy {shown(proxy)})"


def _retry_after(headers: Mapping[str, str], default: float) -> float:
    try:
        return min(max(float(headers["Retry-After"]), 0.0), _MAX_RETRY_AFTER_S)
    except (KeyError, ValueError):
        return default


def _data(response: httpx.Response, ref: ModelRef, endpoint: str) -> Mapping[str, Any]:
    """The `Data` of a good answer; every other answer is the error it stands for."""
    status = response.status_code
    if status in (401, 403):
        raise denied(ref, endpoint, status)
    if status == 429 or status >= 500:
        raise unreachable(endpoint, f"it answers HTTP {status}")
    document = _hub_document(response)
    if document is None:
        raise unreachable(endpoint, f"no ModelScope hub answers there (HTTP {status}, {_kind(response)})")
    if status == 404:
        raise NotFoundError(
            f"no model {ref.id} on {shown(endpoint)}",
            hint="check the spelling; a private model needs MODELSCOPE_API_TOKEN",
        )
    data = document.get("Data")
    if status != 200 or document.get("Success") is False:
        raise MdeployError(f"{shown(endpoint)} refuses {ref} (HTTP {status}): {document.get('Message')}")
    return data if isinstance(data, dict) else {}


def _hub_document(response: httpx.Response) -> Mapping[str, Any] | None:
    try:
        document = response.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) and "Code" in document else None


def _kind(response: httpx.Response) -> str:
    kind: str = response.headers.get("Content-Type", "").partition(";")[0]
    return kind or "no content type"


def _nothing_there(ref: ModelRef, known: tuple[str, ...], endpoint: str) -> NotFoundError:
    if ref.revision in known:
        return NotFoundError(f"{ref.id} is empty at revision {ref.revision!r} on {shown(endpoint)}")
    choices = ", ".join(known[:8]) + (", …" if len(known) > 8 else "") if known else DEFAULT_REVISION
    return NotFoundError(
        f"no revision {ref.revision!r} of {ref.id} on {shown(endpoint)}", hint=f"try --revision with: {choices}"
    )


def _revisions(client: httpx.Client, ref: ModelRef, endpoint: str) -> tuple[str, ...]:
    """Branches and tags, for a hint only: nothing where the hub does not say."""
    import httpx

    try:
        document = _hub_document(client.get(f"{endpoint}/api/v1/models/{ref.id}/revisions")) or {}
        groups = document["Data"]["RevisionMap"]
        return tuple(str(item["Revision"]) for key in ("Branches", "Tags") for item in groups.get(key) or ())
    except (httpx.HTTPError, KeyError, TypeError, AttributeError):
        return ()


def _is_blob(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("Type", "blob") != "tree"


def _file(entry: Mapping[str, Any]) -> RepoFile:
    path = safe_path(entry.get("Path") or entry.get("Name"))
    size, sha256 = entry.get("Size"), str(entry.get("Sha256") or "").lower()
    if not isinstance(size, int) or size < 0:
        raise MdeployError(f"the hub lists {path!r} with size {size!r}; nothing was downloaded")
    return RepoFile(path, size, sha256 if _SHA256.fullmatch(sha256) else None)


def _head(data: Mapping[str, Any], entries: list[Any]) -> str | None:
    """The full hash of the head commit: a listing has it short, and full at each file it touched."""
    committer = data.get("LatestCommitter")
    short = committer.get("ShortId") if isinstance(committer, dict) else None
    if not isinstance(short, str) or len(short) < 7:
        return None
    commits = {str(entry.get("Revision")) for entry in entries if isinstance(entry, dict)}
    return next((commit for commit in sorted(commits) if commit.startswith(short)), None)
