"""Questions to the server before the load: its model, its token counts, and one request as a trial.

Ordinary HTTP with httpx, which must never see the load path. Proxy variables are ignored here as they
are there: both have to reach the same server.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mdeploy.bench import plan, targets
from mdeploy.bench.prompts import Count
from mdeploy.bench.request import BenchRequest, complete
from mdeploy.bench.types import BenchOptions, BenchTarget
from mdeploy.errors import ConfigError, MdeployError, NotFoundError, NotReadyError, UnavailableError

if TYPE_CHECKING:
    import httpx

_QUESTION_TIMEOUT_S = 10.0
_ANSWER_BYTES = 300


class Control:
    """A session with one server; use it in a `with`."""

    def __init__(self, target: BenchTarget, options: BenchOptions) -> None:
        import httpx

        self.root = plan.root_url(target)
        self._target = target
        self._options = options
        self._endpoint = targets.for_endpoint(options.endpoint)
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._http = httpx.Client(base_url=self.root, headers=headers, trust_env=False, timeout=_QUESTION_TIMEOUT_S)

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def address(self) -> tuple[int, tuple[Any, ...]]:
        """The server's address family and socket address, resolved once and proven to accept."""
        parts = urlsplit(self.root)
        port = parts.port or 80
        try:
            with socket.create_connection((parts.hostname, port), timeout=_QUESTION_TIMEOUT_S) as sock:
                return int(sock.family), sock.getpeername()
        except OSError as error:
            raise self._unreachable(error) from error

    def model(self) -> str:
        """The model to ask for: the caller's, else the first the server lists."""
        if self._target.model:
            return self._target.model
        models = self.models()
        if not models:
            raise NotFoundError(f"{self.root} does not say which models it serves", hint="name one with --model")
        return models[0]

    def models(self) -> tuple[str, ...]:
        """Names in /v1/models; empty where the server has no such page."""
        response = self._ask("GET", "/v1/models")
        if response.status_code in (401, 403):
            raise self._denied(response)
        if response.status_code >= 500:
            raise self._failing(response)
        listed = _object(response).get("data")
        rows = listed if isinstance(listed, list) else []
        return tuple(str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row)

    def counter(self, model: str) -> Count | None:
        """A function that counts a prompt's tokens on the server, None where the server does not."""

        def count(text: str) -> int:
            body = {"model": model, **self._endpoint.prompt(text)}
            return int(_object(self._ask("POST", "/tokenize", body))["count"])

        try:
            count("one")
        except (KeyError, TypeError, ValueError):
            return None
        return count

    def request(self) -> BenchRequest:
        """The request to measure with: the user's, completed by the example in the server's /openapi.json.

        It is sent once: a warm-up, and a clear error where the load would drown it. Raises as `accepts` does.
        """
        ask = self._options.ask
        document = None if ask.path and ask.body is not None else _object(self._allowed("GET", "/openapi.json"))
        found = complete(ask, document)
        self._check_plain(self._send(found), found)
        return found

    def _allowed(self, method: str, path: str) -> httpx.Response:
        response = self._ask(method, path)
        if response.status_code in (401, 403):
            raise self._denied(response)
        return response

    def _send(self, request: BenchRequest) -> httpx.Response:
        headers = {"Content-Type": request.content_type, "Accept": "*/*"}
        return self._exchange(request.method, request.path, self._options.timeout_s, request.body, headers)

    def _check_plain(self, response: httpx.Response, request: BenchRequest) -> None:
        if response.is_success:
            return
        if response.status_code in (401, 403):
            raise self._denied(response)
        if response.status_code in (404, 405):
            text = f"{self.root} does not take {request.method} {request.path} ({response.status_code})"
            raise NotFoundError(f"{text}: {_words(response)}", hint="--path names another one")
        if response.status_code >= 500 or response.status_code == 429:
            raise self._failing(response)
        text = f"the server refuses the request ({response.status_code}): {_words(response)}"
        raise MdeployError(text, hint="--data, --file and --content-type make another one")

    def environment(self) -> Mapping[str, Any]:
        """What the server says of itself (vLLM's /version)."""
        version = _object(self._ask("GET", "/version")).get("version")
        return {"server_version": version} if version else {}

    def accepts(self, model: str, text: str) -> bool:
        """Send one request as the load will: a warm-up, and a clear error where the load would drown it.

        Returns whether the server takes `ignore_eos`; one that refuses it is asked again without.
        Raises NotFoundError, ConfigError (key), NotReadyError, UnavailableError or MdeployError.
        """
        response = self._try(model, text, ignore_eos=True)
        if response.status_code in (400, 422):
            plain = self._try(model, text, ignore_eos=False)
            if plain.is_success:
                self._check_stream(plain)
                return False
            response = plain
        self._check_status(response, model)
        self._check_stream(response)
        return True

    def _try(self, model: str, text: str, *, ignore_eos: bool) -> httpx.Response:
        fields = plan.request_options(self._options, ignore_eos=ignore_eos)
        body = targets.body(self._endpoint, model, text, fields)
        return self._ask("POST", self._endpoint.path, body, timeout_s=self._options.timeout_s)

    def _check_status(self, response: httpx.Response, model: str) -> None:
        if response.is_success:
            return
        if response.status_code in (401, 403):
            raise self._denied(response)
        if response.status_code == 404:
            known = ", ".join(self.models()) or "none that it lists"
            raise NotFoundError(
                f"{self.root} has no {self._endpoint.path} for model {model}: {_words(response)}",
                hint=f"it serves: {known}",
            )
        if response.status_code >= 500 or response.status_code == 429:
            raise self._failing(response)
        raise MdeployError(f"the server refuses the request ({response.status_code}): {_words(response)}")

    def _check_stream(self, response: httpx.Response) -> None:
        if "text/event-stream" not in response.headers.get("content-type", ""):
            raise MdeployError(
                f"{self.root}{self._endpoint.path} does not stream its answers",
                hint="bench needs an OpenAI-compatible server that honours stream: true",
            )
        error = _error_in(response.text)
        if error is not None:
            raise UnavailableError(f"{self.root} fails while answering: {error}")

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = _QUESTION_TIMEOUT_S,
    ) -> httpx.Response:
        content = None if body is None else plan.json_bytes(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        return self._exchange(method, path, timeout_s, content, headers)

    def _exchange(
        self, method: str, path: str, timeout_s: float, content: bytes | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        import httpx

        try:
            return self._http.request(method, path, content=content, headers=dict(headers), timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise NotReadyError(
                f"{self.root}{path} gave no answer in {timeout_s:g} s",
                hint="a larger --timeout, or see the service's log",
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> MdeployError:
        return UnavailableError(f"cannot reach {self.root}: {error}", hint="mdeploy ps shows what runs")

    def _failing(self, response: httpx.Response) -> MdeployError:
        return UnavailableError(f"{self.root} answers {response.status_code}: {_words(response)}")

    def _denied(self, response: httpx.Response) -> MdeployError:
        state = "refuses the key" if self._target.api_key else "wants a key"
        return ConfigError(f"{self.root} {state} ({response.status_code})", hint="set MDEPLOY_API_KEY")


def _object(response: httpx.Response) -> Mapping[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _error_in(stream: str) -> str | None:
    """The message of an error inside a stream that began well."""
    import orjson

    for line in stream.splitlines():
        payload = line.removeprefix("data:").strip()
        if line.startswith("data:") and payload.startswith("{"):
            try:
                error = targets.error_of(orjson.loads(payload))
            except orjson.JSONDecodeError:
                return f"not JSON: {payload[:_ANSWER_BYTES]}"
            if error is not None:
                return error[:_ANSWER_BYTES]
    return None


def _words(response: httpx.Response) -> str:
    """The server's own explanation, short."""
    document = _object(response)
    error = document.get("error", document)
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or response.text or "no explanation").split())[:_ANSWER_BYTES]
