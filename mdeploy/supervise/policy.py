"""Whether and when an engine that ended is started again. Values in, values out: histories replay in tests.

Doubling pauses keep a broken engine from burning the machine; a quarter of an hour of crashes ends
in a service that says `failed` with its cause, not in a loop nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mdeploy.specs import RestartPolicy

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
HEALTHY_S = 600.0
"""After this long in service the failures before it are forgotten."""

FAILURES, WINDOW_S = 5, 1800.0
"""So many failures within so many seconds, and `on-failure` gives up."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How one run of an engine ended, unasked.

    `at` is Unix time. `ready_s` is how long it had been in service, None where it never was.
    """

    at: float
    ready_s: float | None
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do: start again after `pause_s`, or (None) give up because of `why`."""

    failures: tuple[float, ...]
    pause_s: float | None
    why: str = ""


def after(policy: RestartPolicy, failures: Sequence[float], ending: Ending, *, served: bool) -> Verdict:
    """Judge one ending; `failures` are those before it, `served` tells whether the service ever was ready.

    A service that never was is not started again: its user waits for the answer, and under
    systemd the unit decides.
    """
    forgotten = ending.ready_s is not None and ending.ready_s >= HEALTHY_S
    recent = () if forgotten else tuple(t for t in failures if 0 <= ending.at - t < WINDOW_S)
    known = (*recent, ending.at)
    if policy == "never" or ending.permanent or not served:
        return Verdict(known, None)
    if policy == "on-failure" and len(known) >= FAILURES:
        return Verdict(known, None, f"{len(known)} failures within {WINDOW_S / 60:.0f} minutes")
    return Verdict(known, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(len(known) - 1, 10)))
