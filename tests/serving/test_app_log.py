"""What an app's log says of its start-up and its end."""

from __future__ import annotations

import pytest

from mdeploy.serving import log

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "/srv/app.py", line 12, in init',
    "    self.model = load()",
    "ValueError: bad weights",
]


def test_the_latest_step() -> None:
    lines = ["mdeploy-app: starting 1 handler on cpu", "loading", "mdeploy-app: listening on 127.0.0.1:1", "x"]
    assert log.progress(lines) == "listening on 127.0.0.1:1"
    assert log.progress(["mdeploy-app: error: no"]) == log.progress([]) == ""


@pytest.mark.parametrize(
    ("lines", "status", "cause", "code", "permanent"),
    [
        (["mdeploy-app: error: ValueError: x (a.py, line 3)"], 1, "ValueError: x (a.py, line 3)", 1, True),
        (["mdeploy-app: error: A has neither inference nor forward"], 78, "neither inference", 78, True),
        (["mdeploy-app: error: RuntimeError: CUDA out of memory. Tried"], 1, "out of memory", 5, False),
        (["mdeploy-app: error: cannot listen on 127.0.0.1:1: in use"], 78, "cannot listen", 78, False),
        (TRACEBACK, 1, "ValueError: bad weights (/srv/app.py:12)", 1, True),
        (["nothing to see"], 3, "ended with status 3", 1, False),
        ([], -9, "was killed by SIGKILL", 1, False),
        (["mdeploy-app: error: x"], -11, "was killed by SIGSEGV without being asked: x", 1, False),
    ],
)
def test_why_it_did_not_start(lines: list[str], status: int, cause: str, code: int, permanent: bool) -> None:
    found = log.explain(lines, status, was_ready=False)
    assert cause in found.cause
    assert (found.exit_code, found.permanent) == (code, permanent)


def test_an_end_after_it_was_ready_is_tried_again() -> None:
    found = log.explain(["mdeploy-app: error: no worker is left"], 1, was_ready=True)
    assert found.cause == "the app ended with status 1 without being asked: no worker is left"
    assert not found.permanent
