"""`mdeploy run NAME`: the one main process of a service in every mode.

It starts the engine, says ready only after a real answer, tells a hung engine from a slow one,
starts it again when it ends unasked, and leaves no process, no port and no shared memory behind.
What it needs of the machine (clock, engines, probes) is handed in: histories replay in tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import FrameType

from mdeploy.errors import ConfigError, ExitCode
from mdeploy.specs import Diagnosis, Manager, Phase, ServiceRecord, ServiceSpec
from mdeploy.supervise import causes, policy, processes, secrets
from mdeploy.supervise.causes import Words
from mdeploy.supervise.engine import Engine
from mdeploy.supervise.guard import Guard
from mdeploy.supervise.notify import Notifier
from mdeploy.supervise.state import ServiceFiles
from mdeploy.supervise.world import Headers, Watching, World

_TICK_S, _CALM_TICK_S = 0.25, 0.5
_PROMPT_S = 0.05

_REFUSALS = 3
"""Times in a row that a healthy engine may call our request wrong (4xx) before it is not asked again."""

_STRAGGLERS_S = 3.0
"""What the engine's children get to end by themselves once its main process has."""

_GPU_S = 15.0
"""How long a driver may take to give memory back after the processes that held it are gone."""

_GPU_POLL_S, _GPU_TOLERANCE_MIB = 1.0, 256


@dataclass(frozen=True, slots=True)
class _End:
    """How a run ended: `cause` is None where that was asked for; `ready_s` None where it never was ready.

    `stuck` says that processes of it would not die.
    """

    cause: Diagnosis | None
    ready_s: float | None = None
    stuck: bool = False


class Supervisor:
    """Runs one service from its start to a clean end, through as many engines as that takes."""

    def __init__(
        self,
        spec: ServiceSpec,
        files: ServiceFiles,
        manager: Manager,
        words: Words,
        world: World,
        guard: Guard | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        self._spec, self._files, self._words, self._world = spec, files, words, world
        self._guard, self._resumed, self._manager = guard, resumed, manager
        self._notifier = Notifier(os.environ)
        self._stops = self._reloads = 0
        self._served = resumed
        self._written: tuple[ServiceRecord, object] | None = None
        self._complaint = ""
        pid = os.getpid()
        self._record = ServiceRecord(
            name=spec.name,
            run_id="",
            pid=pid,
            pid_created=processes.created(pid) or 0.0,
            boot_id=processes.boot_id(),
            manager=manager,
            phase="starting",
            since=world.unix(),
        )

    def run(self) -> int:
        """Until the service is given up or a signal asks for the end; returns the exit code."""
        with self._files.locked():
            if self._manager == "detached" and not self._resumed:
                self._files.forget_own_words()
            previous = self._files.record()
            if self._resumed and not self._is_wanted(previous):
                return ExitCode.OK
            self._on_signals()
            end = self._take_over(previous)
            processes.become_subreaper()
            code = self._serve(end)
            if self._guard:  # not after an exception: then it shall take our place
                self._guard.dismiss()
            return code

    def stop(self, *, hurry: bool = False) -> None:
        """Ask for the end. Asking again changes nothing, unless in a `hurry`: then what drains is cut short."""
        self._stops = self._stops + 1 if hurry else max(self._stops, 1)
        self._world.wake()

    def reload(self) -> None:
        """Ask the engine to read its keys again."""
        self._reloads += 1
        self._world.wake()

    # start

    def _on_signals(self) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stop(hurry=number == signal.SIGINT)  # Ctrl-C once more; `mdeploy stop` may be typed by two people

        def reload(number: int, frame: FrameType | None) -> None:
            self.reload()

        has_terminal = self._manager == "foreground"
        hang_up = stop if has_terminal else reload
        for number, handler in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, hang_up)):
            # nohup asks to outlive a terminal; without one a hang-up comes from `mdeploy keys`
            is_ours = number == signal.SIGHUP and not has_terminal
            if is_ours or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def _is_wanted(self, previous: ServiceRecord | None) -> bool:
        """False where somebody stopped the service before its guard came."""
        return previous is None or (
            previous.phase not in ("stopped", "failed") and not self._files.is_forbidden(previous)
        )

    def _take_over(self, previous: ServiceRecord | None) -> _End | None:
        """End what a killed supervisor left: it would hold our port and our memory.

        Returns how that run ended, where we come to go on with the service.
        """
        ready_s = None
        if previous is None:  # damaged: its processes cannot be named, what they shared can
            processes.unlink_shared_memory(self._files.segments().ours(), timeout_s=0.0)
        if previous and previous.boot_id == self._record.boot_id:
            self._files.check_owner()
            processes.end_run(previous.run_id, self._files.segments().ours(), previous.scratch)
            ready_s = self._world.unix() - previous.since if previous.phase == "ready" else None
            if self._resumed:
                self._record = replace(self._record, run_id=previous.run_id, scratch=previous.scratch)
            if self._resumed or (self._manager == "systemd" and previous.phase != "stopped"):
                # one more life of the same service: what went wrong before still counts
                again = previous.restarts + (0 if self._resumed else 1)
                self._record = replace(self._record, failures=previous.failures, restarts=again)
        if not self._resumed:
            return None
        return _End(causes.supervisor_killed(self._spec.name), ready_s)

    def _serve(self, end: _End | None) -> int:
        policy_ = "never" if self._resumed and self._manager == "foreground" else self._spec.restart
        while True:
            end = end or self._one_run()
            if end.cause is None:
                return self._stopped()
            if self._stops:
                return self._failed(end.cause, "") if end.stuck else self._stopped()
            ending = policy.Ending(self._world.unix(), end.ready_s, end.cause.permanent)
            verdict = policy.after(policy_, self._record.failures, ending, served=self._served)
            self._record = replace(self._record, failures=verdict.failures)
            if verdict.pause_s is None:
                return self._failed(end.cause, verdict.why)
            if not self._pause(end.cause, verdict):
                return self._stopped()
            end = None

    def _pause(self, cause: Diagnosis, verdict: policy.Verdict) -> bool:
        """Wait before the next start; False where the end was asked for meanwhile."""
        pause = verdict.pause_s or 0.0
        text = f"starting again in {pause:g} s (failure {len(verdict.failures)})"
        self._note(f"{cause.cause}; {text}")
        self._record = replace(
            self._record, error=cause.cause, hint=cause.hint, restarts=self._record.restarts + 1, engine_pid=None
        )
        deadline = self._world.now() + pause
        while not self._stops and self._world.now() < deadline:
            self._write("starting", text)
            self._housekeep(None)
            self._world.wait(min(_TICK_S, max(deadline - self._world.now(), 0.0)))
        return not self._stops

    def _one_run(self) -> _End:
        run_id = uuid.uuid4().hex
        self._record = replace(self._record, run_id=run_id, scratch=str(processes.scratch(run_id)), engine_pid=None)
        self._write("starting", "starting the engine")
        if self._guard:
            self._guard.keep()
        before = self._world.free_mib()
        try:
            self._world.check_port()
            keys = secrets.read(self._spec.secrets, self._manager)
            headers = self._headers()
            engine = self._world.spawn(run_id, keys)
        except (OSError, ConfigError) as error:
            processes.remove_scratch(self._record.scratch)
            return _End(causes.cannot_start(error))
        watch = self._world.watch(run_id, headers)
        try:
            return self._watch_over(engine, watch, before)
        except BaseException:  # a bug of ours must not leave an engine nobody watches
            engine.end()
            raise
        finally:
            watch.stop()

    def _headers(self) -> Headers:
        """What our questions carry: the key the engine was started with, or the newest where it reloads."""
        known = secrets.headers(self._spec, self._manager)

        def newest() -> Mapping[str, str]:
            nonlocal known
            with contextlib.suppress(ConfigError):  # a file that is being replaced says nothing of the engine
                known = secrets.headers(self._spec, self._manager)
            return known

        return newest if self._spec.reloads else lambda: known

    # life

    def _watch_over(self, engine: Engine, watch: Watching, free_before: Mapping[int, int]) -> _End:
        started = self._world.now()
        ready_at: float | None = None
        self._record = replace(self._record, engine_pid=engine.pid)
        self._write("starting", "starting the engine")
        watch.start()
        while True:
            self._world.wait(_TICK_S if ready_at is None else _CALM_TICK_S)
            self._housekeep(engine)
            if self._stops:
                return self._stop(engine, free_before)
            if watch.ready.is_set() and ready_at is None:
                ready_at = self._world.now()
                self._now_ready(engine)
            status = engine.poll()
            engine.observe(starting=ready_at is None)
            cause = (
                self._ended(engine, status, ready_at is not None)
                if status is not None
                else self._starting(engine, watch, started)
                if ready_at is None
                else self._serving(engine, watch)
            )
            if cause is not None:
                self._clean_up(engine, free_before)
                return _End(cause, None if ready_at is None else self._world.now() - ready_at)

    def _starting(self, engine: Engine, watch: Watching, started: float) -> Diagnosis | None:
        """Look at an engine that has not answered yet; the cause where it never will."""
        seconds = self._spec.limits.start_timeout_s
        if watch.refusals >= _REFUSALS:
            return causes.refuses(self._spec.name, watch.last.detail)
        if self._world.now() - started > seconds:
            seen = watch.refusal or watch.last.detail
            self._terminate(engine)
            return causes.too_late(self._spec.name, seconds, seen)
        step = self._words.progress(engine.lines()) or "starting the engine"
        self._write("starting", f"{step}: {watch.refusal}" if watch.refusal else step)
        self._notifier.more_time()
        return None

    def _serving(self, engine: Engine, watch: Watching) -> Diagnosis | None:
        """Look at an engine that has answered; the cause where it hangs and must go."""
        condition = watch.condition(engine.frozen(), engine.lost())
        if condition.state == "hung":
            return causes.hangs(self._spec.name, condition.detail)
        if condition.state == "sick":
            self._write("unhealthy", condition.detail)
        elif self._record.phase != "ready":
            self._write("ready")
        return None

    def _now_ready(self, engine: Engine) -> None:
        """It has answered a real request."""
        self._served = True
        engine.look()
        self._record = replace(self._record, error=None, hint="")
        self._write("ready")
        self._notifier.ready(f"ready on {self._spec.url}")

    def _ended(self, engine: Engine, status: int, was_ready: bool) -> Diagnosis:
        engine.end()  # after this its log is whole
        return self._words.explain(engine.lines(), status, was_ready)

    def _housekeep(self, engine: Engine | None) -> None:
        """What must go on in every phase: our own guard, the unit's watchdog, a record that is true, reloads."""
        self._notifier.alive()
        if self._guard:
            self._guard.keep()
        self._write(self._record.phase, self._record.detail)
        if self._reloads and engine is not None and self._record.phase == "ready":
            self._reloads = 0
            self._pass_on_reload(engine)

    def _pass_on_reload(self, engine: Engine) -> None:
        if not self._spec.reloads:
            self._note(f"this engine cannot reload; mdeploy restart {self._spec.name} does more")
            return
        self._notifier.reloading()
        engine.signal(signal.SIGHUP)
        self._note("asked the engine to reload")
        self._notifier.ready(f"ready on {self._spec.url}")

    # end

    def _stop(self, engine: Engine, free_before: Mapping[int, int]) -> _End:
        self._notifier.stopping()
        self._write("stopping")
        self._terminate(engine)
        survivors = self._clean_up(engine, free_before)
        return _End(causes.will_not_die(survivors), stuck=True) if survivors else _End(None)

    def _stopped(self) -> int:
        self._record = replace(self._record, engine_pid=None, error=None, hint="", failures=())
        self._write("stopped")
        return ExitCode.OK

    def _failed(self, cause: Diagnosis, why: str) -> int:
        """Write the end down; to systemd the exit code says whether trying again can help."""
        text = f"{cause.cause} ({why})" if why else cause.cause
        self._record = replace(self._record, engine_pid=None, error=text, hint=cause.hint, exit_code=cause.exit_code)
        self._write("failed")
        self._notifier.status(text)
        self._note(f"given up: {text}")
        if self._manager == "foreground":
            complain(f"error: {text}\nhint:  {cause.hint}")
        if self._manager == "systemd":
            return ExitCode.CONFIG if cause.permanent else ExitCode.FAILURE
        return cause.exit_code

    def _terminate(self, engine: Engine) -> None:
        """TERM the main process and give it time to drain; a second request to stop cuts it short."""
        engine.signal(signal.SIGTERM)
        self._wait_while(lambda: engine.poll() is None, self._spec.limits.stop_timeout_s)
        if engine.poll() is not None:
            self._wait_while(engine.lives, _STRAGGLERS_S)

    def _wait_while(self, going: Callable[[], bool], seconds: float, pause_s: float = _PROMPT_S) -> None:
        asked, deadline = max(self._stops, 1), self._world.now() + seconds
        while going() and self._world.now() < deadline and self._stops <= asked:
            self._notifier.alive()
            self._notifier.more_time()
            self._world.wait(pause_s)

    def _clean_up(self, engine: Engine, free_before: Mapping[int, int]) -> tuple[int, ...]:
        """End all of a run and wait until its GPUs have their memory back; returns what would not die."""
        survivors = engine.end()
        held: dict[int, int] = {}

        def still_held() -> bool:
            nonlocal held
            now = self._world.free_mib() if free_before else {}
            missing = {gpu: free - now.get(gpu, free) for gpu, free in free_before.items()}
            held = {gpu: mib for gpu, mib in missing.items() if mib > _GPU_TOLERANCE_MIB}
            return bool(held)

        self._wait_while(still_held, _GPU_S, _GPU_POLL_S)
        if survivors:
            self._note(causes.will_not_die(survivors).cause)
        for gpu, mib in held.items():
            self._note(f"GPU {gpu} has {mib} MiB less free memory than before the start: see nvidia-smi")
        return survivors

    # record

    def _note(self, text: str) -> None:
        self._world.note(text)

    def _write(self, phase: Phase, detail: str = "") -> None:
        """Record a change, or a record that somebody damaged; one that is true is not written again.

        A full disk must not end a healthy service: where it cannot be written we say so and try
        again at the next tick.
        """
        since = self._world.unix() if phase != self._record.phase else self._record.since
        self._record = record = replace(self._record, phase=phase, since=since, detail=detail)
        if detail:
            self._notifier.status(detail)
        if self._written == (record, self._files.record_stamp()):
            return
        try:
            self._files.write_record(record)
        except ConfigError as error:
            if error.message != self._complaint:
                complain(f"warning: {error.message}")
            self._complaint = error.message
        else:
            self._written, self._complaint = (record, self._files.record_stamp()), ""


def complain(text: str) -> None:
    """To our stderr, which may lie on the very disk that is full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201
