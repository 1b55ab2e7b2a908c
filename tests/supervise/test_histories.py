"""Whole lives of a service in virtual time: an engine is a script, an hour takes a millisecond."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError
from mdeploy.paths import Paths
from mdeploy.specs import Diagnosis, Limits, Probe, RestartPolicy, ServiceRecord, ServiceSpec
from mdeploy.supervise.causes import Words
from mdeploy.supervise.health import Condition, Health
from mdeploy.supervise.ports import PortTakenError
from mdeploy.supervise.state import ServiceFiles
from mdeploy.supervise.supervisor import Supervisor
from mdeploy.supervise.world import Headers

PROBE = Probe("/health", "/v1", {})


@dataclasses.dataclass(frozen=True)
class Script:
    """What one engine does, in seconds after its start."""

    ready: float | None = 10
    dies: float | None = None
    hangs: float | None = None
    refuses: bool = False
    ignores_term: bool = False
    says: str = "crash"


class ScriptedEngine:
    def __init__(self, world: ScriptedWorld, script: Script) -> None:
        self.pid, self._world, self._script, self._start = 4242, world, script, world.now()
        self.terminated: float | None = None
        self.ended = False

    def poll(self) -> int | None:
        age, dies = self._world.now() - self._start, self._script.dies
        if dies is not None and age >= dies:
            return 0
        return 0 if self.terminated is not None and not self._script.ignores_term else None

    def observe(self, *, starting: bool) -> None:
        pass

    def look(self) -> None:
        pass

    def frozen(self) -> tuple[int, ...]:
        return ()

    def lost(self) -> tuple[int, ...]:
        return ()

    def signal(self, number: int) -> None:
        self.terminated = self._world.now()

    def lives(self) -> bool:
        return self.poll() is None

    def lines(self) -> Sequence[str]:
        return [self._script.says]

    def end(self) -> tuple[int, ...]:
        self.ended = True
        return ()


class ScriptedWatch:
    def __init__(self, world: ScriptedWorld, script: Script) -> None:
        self._world, self._script, self._start = world, script, world.now()
        self.ready = threading.Event()
        self.refusals = 3 if script.refuses else 0
        self.refusal = ""
        self.last = Health(False, "connection refused")

    def start(self) -> None:
        self._world.on_tick = self._look

    def _look(self) -> None:
        if self._script.ready is not None and self._world.now() - self._start >= self._script.ready:
            self.ready.set()

    def stop(self) -> None:
        self._world.on_tick = lambda: None

    def condition(self, frozen: Sequence[int], lost: Sequence[int]) -> Condition:
        hangs = self._script.hangs
        hung = hangs is not None and self._world.now() - self._start >= hangs
        return Condition("hung", "no answer") if hung else Condition("well")


class ScriptedWorld:
    """A clock that jumps, engines that die on cue, and a diary of what happened when."""

    def __init__(self, scripts: Sequence[Script], at: Mapping[float, Callable[[], None]] | None = None) -> None:
        self._now, self._scripts, self.at = 0.0, list(scripts), dict(at or {})
        self.on_tick: Callable[[], None] = lambda: None
        self.engines: list[ScriptedEngine] = []
        self.starts: list[float] = []
        self.notes: list[str] = []
        self.free = {0: 1000}
        self.port_error: ConfigError | None = None
        self._script = Script()

    def now(self) -> float:
        return self._now

    def unix(self) -> float:
        return 1_000_000 + self._now

    def wait(self, seconds: float) -> None:
        self._now = round(self._now + max(seconds, 0.01), 3)
        assert self._now < 1e6, "the history does not end"
        self.on_tick()
        for moment in [m for m in self.at if m <= self._now]:
            self.at.pop(moment)()

    def wake(self) -> None:
        pass

    def check_port(self) -> None:
        if self.port_error:
            raise self.port_error

    def spawn(self, run_id: str, secrets: Mapping[str, str]) -> ScriptedEngine:
        self._script = self._scripts.pop(0)
        self.starts.append(self._now)
        self.engines.append(ScriptedEngine(self, self._script))
        return self.engines[-1]

    def watch(self, run_id: str, headers: Headers) -> ScriptedWatch:
        return ScriptedWatch(self, self._script)

    def free_mib(self) -> Mapping[int, int]:
        return self.free

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclasses.dataclass
class Life:
    """One service and the phases it was seen in."""

    supervisor: Supervisor
    world: ScriptedWorld
    files: RecordingFiles

    def run(self) -> int:
        return self.supervisor.run()


class RecordingFiles(ServiceFiles):
    def __init__(self, paths: Paths) -> None:
        super().__init__(paths, "s")
        self.phases: list[str] = []

    def write_record(self, record: ServiceRecord) -> None:
        super().write_record(record)
        if not self.phases or self.phases[-1] != record.phase:
            self.phases.append(record.phase)


def explain(lines: Sequence[str], status: int, was_ready: bool) -> Diagnosis:
    return Diagnosis(lines[-1], "mend it", 78 if lines[-1] == "bad flag" else 1, permanent=lines[-1] == "bad flag")


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., Life]:
    def make(*scripts: Script, restart: RestartPolicy = "on-failure", stop_at: float | None = None) -> Life:
        limits = Limits(start_timeout_s=100, stop_timeout_s=30)
        spec = ServiceSpec("s", "llm", ("/x",), {}, "/", "127.0.0.1", 1, PROBE, "m", limits=limits, restart=restart)
        files = RecordingFiles(Paths(tmp_path / "h"))
        at = {} if stop_at is None else {stop_at: lambda: supervisor.stop()}
        world = ScriptedWorld(scripts, at)
        supervisor: Supervisor = Supervisor(spec, files, "detached", Words(lambda lines: "", explain), world)
        return Life(supervisor, world, files)

    return make


def test_a_quiet_life(live: Callable[..., Life]) -> None:
    life = live(Script(), stop_at=5000)
    assert life.run() == 0
    assert life.files.phases == ["starting", "ready", "stopping", "stopped"]
    assert all(engine.ended for engine in life.world.engines)


def test_a_crash_is_mended_after_a_second(live: Callable[..., Life]) -> None:
    life = live(Script(dies=100), Script(), stop_at=500)
    assert life.run() == 0
    assert life.files.phases == ["starting", "ready", "starting", "ready", "stopping", "stopped"]
    assert life.world.starts == pytest.approx([0, 101], abs=0.6)
    record = life.files.record()
    assert record is not None
    assert (record.restarts, record.error) == (1, None)


def test_crash_after_crash_is_given_up_with_the_cause(live: Callable[..., Life]) -> None:
    life = live(*[Script(ready=1, dies=20)] * 9)
    assert life.run() == 1
    gaps = [b - a for a, b in zip(life.world.starts, life.world.starts[1:], strict=False)]
    assert gaps == pytest.approx([21, 22, 24, 28], abs=0.6)
    record = life.files.record()
    assert record is not None
    assert (record.phase, record.error) == ("failed", "crash (5 failures within 30 minutes)")


def test_always_goes_on(live: Callable[..., Life]) -> None:
    life = live(*[Script(ready=1, dies=20)] * 40, Script(), restart="always", stop_at=10_000)
    assert life.run() == 0
    assert len(life.world.starts) == 41


def test_never_stays_down(live: Callable[..., Life]) -> None:
    life = live(Script(dies=100), restart="never")
    assert life.run() == 1
    assert life.files.phases == ["starting", "ready", "failed"]


def test_a_first_start_that_fails_is_not_repeated(live: Callable[..., Life]) -> None:
    life = live(Script(ready=None, dies=5), restart="always")
    assert life.run() == 1
    assert life.world.starts == [0]


def test_a_restart_that_fails_for_good_is_not_repeated(live: Callable[..., Life]) -> None:
    life = live(Script(dies=100), Script(ready=None, dies=5, says="bad flag"), restart="always")
    assert life.run() == 78
    assert len(life.world.starts) == 2


def test_a_restart_that_fails_by_accident_is(live: Callable[..., Life]) -> None:
    life = live(Script(dies=100), Script(ready=None, dies=5), Script(), stop_at=500)
    assert life.run() == 0
    assert life.world.starts == pytest.approx([0, 101, 108], abs=1)


def test_a_start_that_takes_too_long(live: Callable[..., Life]) -> None:
    life = live(Script(ready=None))
    assert life.run() == 4
    assert life.world.engines[0].terminated == pytest.approx(100, abs=1)
    record = life.files.record()
    assert record is not None
    assert "connection refused" in (record.error or "")


def test_an_engine_that_refuses_its_first_request(live: Callable[..., Life]) -> None:
    assert live(Script(ready=None, refuses=True), restart="always").run() == 78


def test_a_hung_engine_is_ended_and_replaced(live: Callable[..., Life]) -> None:
    life = live(Script(hangs=50), Script(), stop_at=500)
    assert life.run() == 0
    assert life.world.engines[0].ended
    assert "the engine hangs: no answer; starting again in 1 s (failure 1)" in life.world.notes


def test_a_stop_during_the_pause_is_obeyed(live: Callable[..., Life]) -> None:
    life = live(*[Script(ready=1, dies=10)] * 4, stop_at=55)
    assert life.run() == 0
    assert life.files.phases[-1] == "stopped"
    assert len(life.world.starts) == 4


def test_an_engine_that_ignores_term_gets_its_time_and_no_more(live: Callable[..., Life]) -> None:
    life = live(Script(ignores_term=True), stop_at=100)
    assert life.run() == 0
    assert life.world.now() == pytest.approx(130, abs=1)
    assert life.world.engines[0].ended


def test_two_people_who_type_stop_do_not_cut_the_drain(live: Callable[..., Life]) -> None:
    life = live(Script(ignores_term=True), stop_at=100)
    life.world.at[101] = lambda: life.supervisor.stop()
    assert life.run() == 0
    assert life.world.now() == pytest.approx(130, abs=1)


def test_ctrl_c_once_more_does(live: Callable[..., Life]) -> None:
    life = live(Script(ignores_term=True))
    life.world.at[100] = life.world.at[101] = lambda: life.supervisor.stop(hurry=True)
    assert life.run() == 0
    assert life.world.now() == pytest.approx(101, abs=1)


def test_memory_a_gpu_does_not_give_back_is_waited_for_and_told(live: Callable[..., Life]) -> None:
    life = live(Script(), stop_at=100)

    def grow() -> None:
        life.world.free = {0: 100}

    life.world.at[50] = grow
    assert life.run() == 0
    assert life.world.now() == pytest.approx(115, abs=1)
    assert any("900 MiB less free memory" in note for note in life.world.notes)


def test_a_port_somebody_took_is_waited_for_once_the_service_has_served(live: Callable[..., Life]) -> None:
    life = live(Script(dies=100), Script(), stop_at=500)

    def take() -> None:
        life.world.port_error = PortTakenError("cannot listen")

    def leave() -> None:
        life.world.port_error = None

    life.world.at[50], life.world.at[103.5] = take, leave
    assert life.run() == 0
    assert life.world.starts == pytest.approx([0, 107], abs=1)


@pytest.mark.parametrize("error", [PortTakenError("cannot listen"), ConfigError("no key")])
def test_a_port_or_key_that_is_not_there_at_the_start_is_told(live: Callable[..., Life], error: ConfigError) -> None:
    life = live(Script())
    life.world.port_error = error
    assert life.run() == 78
    record = life.files.record()
    assert record is not None
    assert (record.phase, record.error) == ("failed", error.message)


def test_a_stopped_service_is_not_resumed(live: Callable[..., Life]) -> None:
    life = live(Script(), stop_at=100)
    assert life.run() == 0
    again = Supervisor(
        life.supervisor._spec, life.files, "detached", Words(lambda lines: "", explain), life.world, resumed=True
    )
    assert again.run() == 0
    assert len(life.world.starts) == 1
