"""One request to an embedding service, asked again while the service restarts or has too much to do.

Proxy variables are ignored, as `mdeploy bench` does: the services are one's own.
"""

from __future__ import annotations

import binascii
import re
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mdeploy.embedding.types import Answer, Encoding, Item, RefusedError, Server, Vector, Wish
from mdeploy.errors import (
    ConfigError,
    MdeployError,
    NotFoundError,
    NotReadyError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    import httpx

PATIENCE_S = 300.0
TIMEOUT_S = 120.0
_LATER = (429, 502, 503, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_FAILURES = 3
"""How often a request may end in a 500 before it is taken for lost."""


class LaterError(MdeployError):
    """The server cannot answer now. `after_s` is when it wants to be asked again, as far as it says so."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class FailingError(MdeployError):
    """The server failed at a request (500)."""


class Client:
    """A session with one service; use it in a `with`. Its methods may be called from several threads."""

    def __init__(
        self,
        server: Server,
        *,
        connections: int = 1,
        patience_s: float = PATIENCE_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        import httpx

        self.root = root_url(server.url)
        self.server = server
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._closing = threading.Event()
        self._has_answered = False
        self._http = httpx.Client(
            base_url=self.root,
            headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else {},
            trust_env=False,
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=connections),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._http.close()

    def model(self) -> str:
        """The model to ask for: the caller's, else the first the server lists. Raises NotFoundError."""
        if self.server.model:
            return self.server.model
        listed = self._patiently("GET", "v1/models", None).get("data")
        rows = listed if isinstance(listed, list) else []
        names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
        if not names:
            raise NotFoundError(f"{self.root} does not say which models it serves", hint="name one with --model")
        return names[0]

    def about(self) -> Mapping[str, Any]:
        """What the service says of itself at /health; empty for a server that has no such page."""
        try:
            return self._once("GET", "health", None)
        except (MdeployError, ValueError):
            return {}

    def post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Any other request. Raises as `embed` does."""
        return self._patiently("POST", path, body)

    def embed(self, model: str, inputs: Sequence[Item], wish: Wish, encoding: Encoding = "float") -> Answer:
        """Vectors of `inputs`, asked for until they come or patience ends.

        Raises RefusedError where an input is to blame, UsageError for a wish that cannot be, NotFoundError for a
        model, ConfigError for a key, UnavailableError or NotReadyError where patience ended.
        """
        body = {"model": model, "input": list(inputs), "encoding_format": encoding, **wish.fields()}
        found = self._patiently("POST", "v1/embeddings", body)
        try:
            return _answer(found, len(inputs))
        except (KeyError, TypeError, ValueError) as error:
            raise MdeployError(f"{self.root} answers what is no list of embeddings: {error}") from error

    # asking

    def _patiently(self, method: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        begun, pause, failures = time.monotonic(), _FIRST_PAUSE_S, 0
        while True:
            try:
                return self._once(method, path, body)
            except LaterError as error:
                wait = pause if error.after_s is None else max(error.after_s, _FIRST_PAUSE_S)
                if time.monotonic() - begun + wait > self._patience_s:
                    raise UnavailableError(f"{error.message}, for {self._patience_s:g} s now") from error
            except FailingError as error:
                failures += 1
                if failures == _FAILURES:
                    raise UnavailableError(error.message, hint="the service's log says why") from error
                wait = pause
            if self._closing.wait(wait):
                raise UnavailableError("the client is closed")
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        import httpx
        import orjson

        content = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            response = self._http.request(method, path, content=content, headers=headers)
        except httpx.TransportError as error:
            raise self._lost(error) from error
        self._has_answered = True
        if not response.is_success:
            raise self._refused(response)
        return _object(response)

    def _lost(self, error: Exception) -> MdeployError:
        """A connection that broke is tried again; a server that never answered is not there."""
        import httpx

        if isinstance(error, httpx.TimeoutException):
            text = f"{self.root} gave no answer in {self._timeout_s:g} s"
            if not self._has_answered:
                return NotReadyError(text, hint="a larger --timeout, or see the service's log")
            return LaterError(text)
        if self._has_answered:
            return LaterError(f"{self.root} cannot be reached: {error}")
        return UnavailableError(f"cannot reach {self.root}: {error}", hint="mdeploy ps shows what runs")

    def _refused(self, response: httpx.Response) -> MdeployError:
        status, words, about = response.status_code, _words(response), _error(response)
        if status in _LATER:
            return LaterError(f"{self.root} answers {status}: {words}", _seconds(response.headers.get("retry-after")))
        if status in (401, 403):
            state = "refuses the key" if self.server.api_key else "wants a key"
            return ConfigError(f"{self.root} {state} ({status})", hint="set MDEPLOY_API_KEY")
        if status == 404:
            return NotFoundError(
                f"{self.root}: {words}", hint="is it an embedding service? --model names another model"
            )
        if status >= 500 and about.get("code") != "bad_vector":
            return FailingError(f"{self.root} answers {status}: {words}")
        param = about.get("param")
        if status in (413, 500) or not isinstance(param, str) or param.startswith("input"):
            return RefusedError(words)
        return UsageError(f"the service refuses {param}: {words}")


def root_url(text: str) -> str:
    """The address below which /v1 lies, with a slash at its end. Raises UsageError for what is no URL."""
    import httpx

    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise UsageError(f"{text} is no URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{text} is no URL of a server", hint="http://HOST:PORT")
    return re.sub(r"(/v1(/embeddings)?)?/*$", "", str(url.copy_with(query=None, fragment=None))) + "/"


def _answer(document: Mapping[str, Any], count: int) -> Answer:
    rows = sorted(document["data"], key=lambda row: row["index"])
    if [row["index"] for row in rows] != list(range(count)):
        raise ValueError(f"{len(rows)} of {count} vectors")
    usage = document.get("usage") or {}
    return Answer(
        tuple(_vector(row["embedding"]) for row in rows),
        int(usage.get("prompt_tokens") or usage.get("total_tokens") or 0),
        str(document.get("model", "")),
    )


def _vector(found: Any) -> Vector:
    if isinstance(found, str):
        raw = binascii.a2b_base64(found)
        if not raw or len(raw) % 4:
            raise ValueError(f"a vector of {len(raw)} bytes")
        return raw
    if not isinstance(found, list) or not found:
        raise TypeError("a vector is a list of numbers or base64")
    return found


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; a date is as good as nothing."""
    return float(text) if text and text.isdigit() else None


def _object(response: httpx.Response) -> Mapping[str, Any]:
    import orjson

    try:
        document = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _error(response: httpx.Response) -> Mapping[str, Any]:
    found = _object(response).get("error")
    return found if isinstance(found, dict) else {}


def _words(response: httpx.Response) -> str:
    """The server's own explanation, short."""
    text = _error(response).get("message") or _object(response).get("message") or response.text or "no explanation"
    return " ".join(str(text).split())[:300]
