"""Knowing that a service works: a port that is open, or a /health that says 200, is not an answer.

vLLM was seen to say 200 and die at the first request. So a service counts as ready once one
real request has been answered; after that its cheap health path is watched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mdeploy.specs import Probe


@dataclass(frozen=True, slots=True)
class Health:
    """The outcome of one probe; `detail` says what was seen when it failed.

    `refused` means that the service calls the request itself wrong (4xx): asking again will not help.
    """

    ok: bool
    detail: str = ""
    refused: bool = False


class Prober(Protocol):
    """Anything that can ask a service how it is."""

    def healthy(self) -> Health:
        """The cheap question."""

    def answers(self) -> Health:
        """The real one: a request like a client's."""


class HttpProber:
    """Asks over HTTP, on the address the service is bound to, never through a proxy."""

    def __init__(self, url: str, probe: Probe, headers: Mapping[str, str]) -> None:
        import httpx

        self._httpx = httpx
        self._probe = probe
        self._client = httpx.Client(base_url=url, headers=dict(headers), trust_env=False)

    def healthy(self) -> Health:
        """GET the health path; it must answer 2xx within 5 s."""
        return self._ask("GET", self._probe.health_path, None, timeout=5.0)

    def answers(self) -> Health:
        """POST the probe's request; it must answer 2xx with a body within the probe's deadline."""
        return self._ask("POST", self._probe.request_path, self._probe.request_body, self._probe.timeout_s)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> Health:
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except self._httpx.HTTPError as error:
            return Health(False, f"{method} {path}: {error or type(error).__name__}")
        if response.is_success:
            return Health(True)
        detail = f"{method} {path} answered {response.status_code}: {response.text[:200]}"
        return Health(False, detail, response.is_client_error and response.status_code != 429)


class Watch(threading.Thread):
    """Probes in the background, so that a slow answer never delays a signal.

    `ready` is set by the first real answer. Before it, `refusal` says how the real request failed
    and `refusals` counts 4xx in a row; after it, `misses` counts failed health checks in a row.
    `is_ours` tells whether a process of this run listens: another server on the port, started in
    the seconds before the engine binds it, answers just as well.
    """

    def __init__(self, prober: Prober, interval_s: float, is_ours: Callable[[], bool]) -> None:
        super().__init__(name="health", daemon=True)
        self._prober, self._interval, self._is_ours = prober, interval_s, is_ours
        self._stopping = threading.Event()
        self.ready = threading.Event()
        self.misses = self.refusals = 0
        self.refusal = ""
        self.last = Health(False, "not asked yet")

    def run(self) -> None:
        """Poll quickly until ready, then at the interval."""
        while not self._stopping.wait(self._interval if self.ready.is_set() else min(self._interval, 0.25)):
            self._once()

    def _once(self) -> None:
        self.last = self._prober.healthy()
        if self.ready.is_set():
            self.misses = 0 if self.last.ok else self.misses + 1
        elif self.last.ok and not self._is_ours():
            self.last = Health(False, "another server answers on this port")
        elif self.last.ok:
            self.last = self._prober.answers()
            self.refusal = self.last.detail
            self.refusals = self.refusals + 1 if self.last.refused else 0
            if self.last.ok:
                self.ready.set()

    def stop(self) -> None:
        """Ask the thread to end; it does after the probe under way."""
        self._stopping.set()
