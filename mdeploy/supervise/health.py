"""Knowing that a service works: a port that is open, or a /health that says 200, is not an answer.

vLLM was seen to say 200 and die at the first request, and it says 200 for ever while its engine
core hangs. So a service counts as ready once one real request has been answered, and stays alive
as long as it answers, or at least works on, requests like that one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mdeploy.specs import Limits, Probe

_MISSES = 3
"""Failures in a row that are no accident."""

_SLOW_S = 5.0
"""A health check without an answer for this long makes a service unhealthy; nothing is restarted for it."""

_EAGER_S, _AGAIN_S = 0.25, 5.0


@dataclass(frozen=True, slots=True)
class Health:
    """The outcome of one probe; `detail` says what was seen when it failed.

    `refused` means that the service calls the request itself wrong (4xx): asking again will not help.
    `busy` means that it sheds load (429, 503); for a health check, that it mends itself and says when (Retry-After).
    """

    ok: bool
    detail: str = ""
    refused: bool = False
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Condition:
    """What is known of a service that was ready: sick ones are shown, hung ones are restarted."""

    state: Literal["well", "sick", "hung"]
    detail: str = ""


class Prober(Protocol):
    """Anything that can ask a service how it is."""

    def healthy(self) -> Health:
        """The cheap question."""

    def answers(self, timeout_s: float) -> Health:
        """The real one: a request like a client's."""

    def work(self) -> str:
        """A text that changes whenever the engine gets on with requests; empty where that cannot be told."""


class HttpProber:
    """Asks over HTTP, on the address the service is bound to, never through a proxy.

    `headers` is called for each question: keys may be rotated while the service runs.
    """

    def __init__(self, url: str, probe: Probe, timeout_s: float, headers: Callable[[], Mapping[str, str]]) -> None:
        import httpx

        self._httpx = httpx
        self._probe, self._timeout_s, self._headers = probe, timeout_s, headers
        self._client = httpx.Client(base_url=url, trust_env=False)

    def healthy(self) -> Health:
        """GET the health path; it must answer 2xx in time."""
        return self._ask("GET", self._probe.health_path, None, self._timeout_s)

    def answers(self, timeout_s: float) -> Health:
        """POST the probe's request; it must answer 2xx with a body within the deadline."""
        return self._ask("POST", self._probe.request_path, self._probe.request_body, timeout_s)

    def work(self) -> str:
        """The engine's counters of work, from its metrics."""
        if not self._probe.work_metrics:
            return ""
        try:
            response = self._client.get("/metrics", headers=dict(self._headers()), timeout=self._timeout_s)
        except self._httpx.HTTPError:
            return ""
        lines = response.text.splitlines() if response.is_success else []
        return "\n".join(line for line in lines if line.startswith(tuple(self._probe.work_metrics)))

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> Health:
        try:
            response = self._client.request(method, path, json=body, headers=dict(self._headers()), timeout=timeout)
        except self._httpx.HTTPError as error:
            return Health(False, f"{method} {path}: {error or type(error).__name__}")
        if response.is_success:
            return Health(True)
        detail = f"{method} {path} answered {response.status_code}: {response.text[:200]}"
        busy = response.status_code in (429, 503) and (method == "POST" or "retry-after" in response.headers)
        return Health(False, detail, response.is_client_error and not busy, busy)


class Liveness:
    """Tells a hung engine from a slow one, from what was asked and answered when.

    Hung is: no good health check for three deadlines and three checks; a process that somebody
    stopped for as long; a real request without an answer for `hang_timeout_s` while no other
    request got on either; three real requests in a row that failed. All times are seconds of one
    clock that the caller reads.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._patience_s = _MISSES * limits.health_timeout_s
        self._well = self._worked = now
        self._asked: float | None = None
        self._question: float | None = None
        self._frozen: float | None = None
        self._misses = self._failures = 0
        self._last = self._reply = Health(True)
        self._doubt = ""

    def asked(self, now: float) -> None:
        """A health check goes out."""
        self._asked = now

    def answered(self, now: float, health: Health) -> None:
        """It came back, or failed."""
        self._asked, self._last = None, health
        self._misses = 0 if health.ok else self._misses + 1
        if health.ok or health.busy:
            self._well = now

    def questioned(self, now: float) -> None:
        """A real request goes out."""
        self._question = now

    def replied(self, now: float, health: Health) -> None:
        """It came back, or failed. One that is refused or shed says nothing of the engine behind."""
        self._question = None
        if health.ok or health.refused or health.busy:
            self._failures, self._reply, self._doubt = 0, Health(True), ""
        else:
            self._failures, self._reply = self._failures + 1, health

    def worked(self, now: float) -> None:
        """The engine was seen to get on with somebody's request."""
        self._worked = now

    def frozen(self, now: float, pids: Sequence[int]) -> None:
        """These processes of the service are stopped (SIGSTOP)."""
        self._frozen = None if not pids else self._frozen if self._frozen is not None else now

    def lost(self, pids: Sequence[int]) -> None:
        """These processes of the service died: until a real request is answered again, nobody knows what that means."""
        self._doubt = f"process {' '.join(map(str, pids))} of it died" if pids else self._doubt

    def condition(self, now: float) -> Condition:
        """What all that says."""
        return self._hung(now) or self._sick(now) or Condition("well")

    def _hung(self, now: float) -> Condition | None:
        question = self._question  # the thread that asks may set it at any moment
        waited = 0.0 if question is None else now - max(question, self._worked)
        silent = now - max(self._well, self._worked)
        if self._misses >= _MISSES and silent > self._patience_s:
            return Condition("hung", f"no good health check for {silent:.0f} s: {self._last.detail}")
        if self._frozen is not None and now - self._frozen > self._patience_s:
            return Condition("hung", f"a process of it has been stopped for {now - self._frozen:.0f} s")
        if waited > self._limits.hang_timeout_s:
            return Condition("hung", f"no request got on for {waited:.0f} s")
        if self._failures >= _MISSES:
            return Condition("hung", f"{self._failures} requests in a row failed: {self._reply.detail}")
        return None

    def _sick(self, now: float) -> Condition | None:
        if self._frozen is not None:
            return Condition("sick", "a process of it is stopped")
        if self._misses >= _MISSES:
            return Condition("sick", self._last.detail)
        asked = self._asked
        if asked is not None and now - asked > _SLOW_S:
            return Condition("sick", f"no answer to a health check for {now - asked:.0f} s")
        if self._failures or self._doubt:
            return Condition("sick", self._reply.detail or self._doubt)
        return None


class _Work:
    """Whether an engine gets on, by its counters; metrics that could not be read say nothing."""

    def __init__(self, prober: Prober) -> None:
        self._prober, self._seen = prober, prober.work()

    def got_on(self) -> bool:
        """True where the counters moved since they were last read."""
        before, now = self._seen, self._prober.work()
        self._seen = now or before
        return bool(before and now and now != before)


class Watch:
    """Probes in the background, so that a slow answer never delays a signal.

    `ready` is set by the first real answer. Before it, `refusal` says how the real request failed
    and `refusals` counts 4xx in a row; after it, `condition` tells how the service is. `is_ours`
    tells whether a process of this run listens: another server on the port, started in the seconds
    before the engine binds it, answers just as well.
    """

    def __init__(self, prober: Prober, limits: Limits, is_ours: Callable[[], bool], answer_s: float) -> None:
        self._prober, self._limits, self._is_ours, self._answer_s = prober, limits, is_ours, answer_s
        self._stopping, self._doubts = threading.Event(), threading.Event()
        self._liveness: Liveness | None = None
        self.ready = threading.Event()
        self.refusals = 0
        self.refusal = ""
        self.last = Health(False, "not asked yet")

    def start(self) -> None:
        """Begin to ask."""
        threading.Thread(target=self._check, name="health", daemon=True).start()

    def stop(self) -> None:
        """Ask the threads to end; they do after the probe under way."""
        self._stopping.set()
        self._doubts.set()

    def condition(self, frozen: Sequence[int], lost: Sequence[int]) -> Condition:
        """How a service is that was ready; `frozen` are its stopped processes, `lost` those that died just now."""
        liveness, now = self._liveness, time.monotonic()
        if liveness is None:
            return Condition("well")
        liveness.frozen(now, frozen)
        liveness.lost(lost)
        if lost:
            self._doubts.set()
        return liveness.condition(now)

    def _check(self) -> None:
        """Poll quickly until ready, then at the interval."""
        while not self._stopping.wait(min(self._limits.health_interval_s, _EAGER_S)):
            self._first()
            if self.ready.is_set():
                break
        liveness = self._liveness
        while liveness is not None and not self._stopping.wait(self._limits.health_interval_s):
            liveness.asked(time.monotonic())
            self.last = self._prober.healthy()
            liveness.answered(time.monotonic(), self.last)

    def _first(self) -> None:
        self.last = self._prober.healthy()
        if self.last.ok and not self._is_ours():
            self.last = Health(False, "another server answers on this port")
        elif self.last.ok:
            self.last = self._prober.answers(self._answer_s)
            self.refusal = self.last.detail
            self.refusals = self.refusals + 1 if self.last.refused else 0
            if self.last.ok:
                self._liveness = Liveness(self._limits, time.monotonic())
                threading.Thread(target=self._question, name="answers", args=(self._liveness,), daemon=True).start()
                self.ready.set()

    def _question(self, liveness: Liveness) -> None:
        """Ask for real now and then, where no client's requests show that the engine works."""
        work, pause = _Work(self._prober), self._limits.answer_interval_s
        while True:
            in_doubt = self._doubts.wait(pause)
            if self._stopping.is_set():
                return
            self._doubts.clear()
            pause = self._limits.answer_interval_s
            if not in_doubt and work.got_on():
                liveness.worked(time.monotonic())
            else:
                pause = pause if self._ask_for_real(liveness) else min(pause, _AGAIN_S)
                work = _Work(self._prober)  # the question itself was work

    def _ask_for_real(self, liveness: Liveness) -> bool:
        """One real request, while a second thread looks whether others get on meanwhile."""
        over = threading.Event()

        def look() -> None:
            work = _Work(self._prober)
            while not over.wait(self._limits.health_interval_s):
                if work.got_on():
                    liveness.worked(time.monotonic())

        looker = threading.Thread(target=look, name="work", daemon=True)
        looker.start()
        liveness.questioned(time.monotonic())
        # Longer than the verdict takes, which is not ours.
        reply = self._prober.answers(timeout_s=10 * self._limits.hang_timeout_s)
        over.set()
        liveness.replied(time.monotonic(), reply)
        return reply.ok
