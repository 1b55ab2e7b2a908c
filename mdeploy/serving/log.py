"""Reading an app's log for people: which step of its start-up this is, and why it ended.

The app says both in lines of its own (`mdeploy-app: <step>`, `mdeploy-app: error: <text>`); a user's traceback
stands before the latter. An app that could say nothing leaves a traceback, whose last frame in their own code is
where they have to look.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mdeploy.endings import ending
from mdeploy.errors import ExitCode
from mdeploy.specs import Diagnosis

_OURS = "mdeploy-app: "
_ERROR = f"{_OURS}error: "
_PACKAGE = str(Path(__file__).parent.parent)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)')
_RAISED = re.compile(r"^(?P<text>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning)\b.*)")

# (pattern in the cause, the way out, exit code, whether it stays so); the first that matches wins
_KNOWN = (
    (r"out of memory|OutOfMemoryError", "fewer --workers-per-gpu, another --gpus", ExitCode.DOES_NOT_FIT, False),
    (r"[Aa]ddress already in use|cannot listen on", "take another --port", ExitCode.CONFIG, False),
    (
        r"No module named|cannot import name",
        "install it where the workers run, name that interpreter with --python, or its directory with --path",
        ExitCode.CONFIG,
        True,
    ),
    (r"no cluster answers|no part of the cluster", "mdeploy cluster status", ExitCode.UNAVAILABLE, False),
    (r"needs a model", "serve it again with --model ID|DIR", ExitCode.CONFIG, True),
    (
        r"neither inference nor forward|defines no Handler",
        "mdeploy init app NAME writes one that works",
        ExitCode.CONFIG,
        True,
    ),
)


def progress(lines: Sequence[str]) -> str:
    """The latest start-up step that the log shows; empty before the first."""
    steps = (line for line in reversed(lines) if line.startswith(_OURS) and not line.startswith(_ERROR))
    return next(steps, "").removeprefix(_OURS)


def explain(lines: Sequence[str], status: int, was_ready: bool) -> Diagnosis:
    """Why the app ended, from its log and its exit status (negative: the signal's number)."""
    said = next((line for line in reversed(lines) if line.startswith(_ERROR)), "").removeprefix(_ERROR)
    cause = said or _raised(lines)
    if was_ready or status <= 0 or not cause:
        text = f"the app {ending(status)} without being asked" + (f": {cause}" if cause else "")
        return Diagnosis(text, "mdeploy logs NAME", ExitCode.FAILURE)
    where = "" if said else _place(lines)  # what the app says has its place in it
    text = f"the app did not start: {cause}" + (f" ({where})" if where else "")
    for pattern, hint, code, stays in _KNOWN:
        if re.search(pattern, cause):
            return Diagnosis(text, hint, code, stays)
    code = ExitCode.CONFIG if status == ExitCode.CONFIG else ExitCode.FAILURE
    return Diagnosis(text, "mdeploy logs NAME", code, permanent=True)


def _raised(lines: Sequence[str]) -> str:
    """The last line of the last traceback."""
    found = (_RAISED.match(line) for line in reversed(lines))
    return next((match["text"][:400] for match in found if match), "")


def _place(lines: Sequence[str]) -> str:
    """The last frame of the last traceback that is not ours: file and line."""
    frames = [match for match in map(_FRAME.match, lines) if match]
    theirs = [match for match in frames if not match["file"].startswith((_PACKAGE, "<"))]
    return f"{theirs[-1]['file']}:{theirs[-1]['line']}" if theirs else ""
