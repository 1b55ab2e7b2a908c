"""Histories of questions and answers: which engine hangs, and which is only slow."""

from __future__ import annotations

from mdeploy.specs import Limits
from mdeploy.supervise.health import Condition, Health, Liveness

LIMITS = Limits(health_interval_s=2, health_timeout_s=10, hang_timeout_s=60)
OK, BROKEN = Health(True), Health(False, "answered 500")


def _states(liveness: Liveness, until: int) -> list[str]:
    """The condition at each second, without repeats."""
    states: list[str] = []
    for now in range(until):
        state = liveness.condition(now).state
        if not states or states[-1] != state:
            states.append(state)
    return states


def test_one_that_answers_is_well() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in range(0, 1000, 2):
        liveness.asked(now)
        liveness.answered(now + 0.1, OK)
        assert liveness.condition(now + 1).state == "well"


def test_one_slow_answer_makes_it_sick_not_hung() -> None:
    liveness = Liveness(LIMITS, 0)
    liveness.asked(2)
    assert liveness.condition(6).state == "well"
    assert liveness.condition(8).state == "sick"
    assert "6 s" in liveness.condition(8).detail
    liveness.answered(9, OK)
    assert liveness.condition(9).state == "well"


def test_misses_make_it_sick_and_only_misses_for_long_make_it_hung() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in (2, 4, 6):
        liveness.asked(now)
        liveness.answered(now, BROKEN)
    assert liveness.condition(7).state == "sick"
    assert liveness.condition(30).state == "sick"
    assert liveness.condition(31).state == "hung"
    assert "500" in liveness.condition(31).detail


def test_one_that_mends_itself_is_sick_and_never_hung() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in range(2, 1000, 2):
        liveness.asked(now)
        liveness.answered(now, Health(False, "answered 503", busy=True))
    assert liveness.condition(1000).state == "sick"


def test_a_front_that_is_slow_while_the_engine_works_is_not_hung() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in range(10, 200, 10):
        liveness.asked(now - 10)
        liveness.answered(now, Health(False, "timed out"))
        liveness.worked(now)
    assert liveness.condition(200).state == "sick"


def test_two_misses_are_an_accident_however_long_they_take() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in (2, 14):
        liveness.asked(now)
        liveness.answered(now + 10, Health(False, "timed out"))
    assert liveness.condition(40).state == "well"


def test_a_request_nobody_works_on_is_a_hang() -> None:
    liveness = Liveness(LIMITS, 0)
    liveness.questioned(100)
    assert liveness.condition(160).state == "well"
    assert liveness.condition(161).state == "hung"


def test_a_request_that_waits_behind_others_is_not() -> None:
    liveness = Liveness(LIMITS, 0)
    liveness.questioned(100)
    for now in range(110, 1000, 30):
        liveness.worked(now)
        assert liveness.condition(now + 29).state == "well"
    assert liveness.condition(1060).state == "hung"


def test_work_of_long_ago_does_not_excuse_a_hang() -> None:
    liveness = Liveness(LIMITS, 0)
    liveness.worked(10)
    liveness.questioned(500)
    assert liveness.condition(561).state == "hung"


def test_requests_that_fail_three_times_in_a_row_are_as_bad() -> None:
    liveness = Liveness(LIMITS, 0)
    seen = []
    for now in (20, 25, 30):
        liveness.questioned(now)
        liveness.replied(now, BROKEN)
        seen.append(liveness.condition(now).state)
    assert seen == ["sick", "sick", "hung"]


def test_shed_and_refused_requests_say_nothing_of_the_engine() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in range(0, 100, 5):
        liveness.questioned(now)
        liveness.replied(now, Health(False, "503", busy=True) if now % 2 else Health(False, "401", refused=True))
        assert liveness.condition(now).state == "well"


def test_a_stopped_process_is_sick_at_once_and_hung_in_the_end() -> None:
    liveness = Liveness(LIMITS, 0)
    liveness.frozen(10, [7])
    assert liveness.condition(10).state == "sick"
    liveness.frozen(40, [7])
    assert liveness.condition(40).state == "sick"
    liveness.frozen(41, [7])
    assert liveness.condition(41).state == "hung"
    liveness.frozen(42, [])
    assert liveness.condition(42).state == "well"


def test_a_process_that_died_makes_it_sick_until_a_request_is_answered() -> None:
    liveness = Liveness(LIMITS, 0)
    liveness.lost([7, 8])
    assert liveness.condition(1) == Condition("sick", "process 7 8 of it died")
    liveness.lost([])
    assert liveness.condition(2).state == "sick"
    liveness.questioned(2)
    liveness.replied(3, OK)
    assert liveness.condition(3).state == "well"


def test_no_answer_for_ever_goes_from_well_to_sick_to_hung() -> None:
    liveness = Liveness(LIMITS, 0)
    for now in (2, 14, 26):
        liveness.asked(now)
        liveness.answered(now + 10, Health(False, "timed out"))
    liveness.asked(38)
    assert _states(liveness, 60)[-1] == "hung"
