"""Reading vLLM's log for people: which step of the start-up this is, and why it ended.

vLLM prints 50 to 170 lines when it fails and the useful one is the first error raised, never
the last. The patterns were checked against the version engines/install.py installs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mdeploy.endings import ending
from mdeploy.errors import ExitCode
from mdeploy.specs import Diagnosis

_STEPS = (
    (r"Application startup complete|Uvicorn running", "asking for a first token"),
    (r"Starting vLLM (API )?server|Started server process", "starting the API server"),
    (r"KV cache size:|Maximum concurrency|init engine .* took", "warming up"),
    (r"Available KV cache memory|[Mm]emory profiling", "sizing the KV cache"),
    (r"Capturing CUDA graph|Compiling a graph|torch\.compile takes", "compiling"),
    (r"Loading weights took|Model loading took", "weights loaded"),
    (r"Loading safetensors.*?(\d+)% Completed", "loading weights {}%"),
    (r"Starting to load model|Loading model|Loading safetensors", "loading weights"),
    (r"Initializing a V1 LLM engine|Waiting for .*engine|vLLM is using", "starting the engine"),
    (r"non-default args|vLLM API server version|version [\d.]+", "reading the configuration"),
)

# (pattern in the log, what it means, the way out, exit code, whether it stays so); the first that matches wins
_KNOWN = (
    (r"address already in use|Errno 98", "the port is already in use", "take another --port", ExitCode.CONFIG, False),
    (
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory",
        "the GPU ran out of memory",
        "lower --gpu-memory-utilization or --max-model-len, or use more GPUs: --tp",
        ExitCode.DOES_NOT_FIT,
        False,
    ),
    (
        r"larger than the available KV cache memory|No available memory for the cache blocks|"
        r"KV cache is needed|max seq len .* is larger than",
        "the KV cache of one request does not fit",
        "lower --max-model-len (auto takes what fits), or use more GPUs: --tp",
        ExitCode.DOES_NOT_FIT,
        True,
    ),
    (
        r"Free memory on device .* is less than desired",
        "another process holds the GPU's memory",
        "see nvidia-smi, or lower --gpu-memory-utilization",
        ExitCode.DOES_NOT_FIT,
        False,
    ),
    (
        r"must be divisible by tensor parallel size",
        "the attention heads cannot be divided by --tp",
        "take a --tp that divides them",
        ExitCode.USAGE,
        True,
    ),
    (r"No space left on device", "the disk (or /dev/shm) is full", "df -h / /dev/shm", ExitCode.FAILURE, False),
    (
        r"unrecognized arguments: (.*)|error: argument (.*)",
        "vLLM does not take this flag",
        "vLLM's own flags: mdeploy serve llm -- …",
        ExitCode.USAGE,
        True,
    ),
)

_ERROR = re.compile(
    r"Value error, (?P<value>.+)|^.*?\b(?P<kind>[A-Z]\w*(?:Error|Exception)): (?P<text>.+)|^.*?\berror: (?P<cli>.+)"
)
_REFUSED = re.compile(r"Value error, |\b(ValueError|AssertionError|ValidationError|NotImplementedError)\b")
_HARMLESS = re.compile(r"(INFO|WARNING|DEBUG)\b")  # they too may quote an error
_PREFIX = re.compile(r"^\((?:\w+\s)*pid=\d+\)\s*")


def progress(lines: Sequence[str]) -> str:
    """The latest start-up step that the log shows; empty before the first."""
    for line in reversed(lines):
        for pattern, step in _STEPS:
            match = re.search(pattern, line)
            if match:
                return step.format(*match.groups()) if "{}" in step else step
    return ""


def explain(lines: Sequence[str], status: int, was_ready: bool) -> Diagnosis:
    """Why the engine ended, from its log and its exit status (negative: the signal's number)."""
    clean = [text for line in lines if not _HARMLESS.match(text := _PREFIX.sub("", line))]
    for line in clean:
        for pattern, meaning, hint, code, stays in _KNOWN:
            if re.search(pattern, line):
                return Diagnosis(f"{meaning}: {_message(line)}", hint, code, stays and not was_ready)
    first = _first_error(clean)
    if was_ready or status < 0 or not first:
        ended = ending(status)
        cause = f"the engine {ended} without being asked" + (f": {first}" if first else "")
        return Diagnosis(cause, "mdeploy logs NAME", ExitCode.FAILURE)
    # A refused value stays refused; a driver or a network that is not there yet may come.
    refused = any(_REFUSED.search(line) for line in clean)
    code = ExitCode.CONFIG if refused else ExitCode.FAILURE
    return Diagnosis(f"vLLM did not start: {first}", "mdeploy logs NAME", code, refused)


def _first_error(lines: Sequence[str]) -> str:
    """The first error raised; pydantic's headline is passed over for the value it complains of."""
    found = [_message(line) for line in lines if _ERROR.search(line)]
    telling = (text for text in found if not re.match(r"\d+ validation errors? for", text))
    return next(telling, found[0] if found else "")


def _message(line: str) -> str:
    match = _ERROR.search(line)
    found = match and (match["value"] or match["text"] or match["cli"])
    return (found or line).strip()[:400]
