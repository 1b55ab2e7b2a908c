"""vLLM's log in a user's words. The lines are vLLM 0.32's own, shortened."""

from __future__ import annotations

import pytest

from mdeploy.errors import ExitCode
from mdeploy.llm import log


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (
            "(APIServer pid=1) INFO 11-21 [api_utils.py:286] non-default args: {'model_tag': 'm'}",
            "reading the configuration",
        ),
        ("(EngineCore pid=2) INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0)", "starting the engine"),
        ("(Worker pid=3) INFO [cpu_model_runner.py:68] Starting to load model /m...", "loading weights"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00]", "loading weights 50%"),
        ("(Worker pid=3) INFO [default_loader.py:501] Loading weights took 0.01 seconds", "weights loaded"),
        ("(EngineCore pid=2) INFO [kv_cache_utils.py] CPU KV cache size: 69,632 tokens", "warming up"),
        (
            "(APIServer pid=1) INFO [entry.py:140] Starting vLLM server on http://127.0.0.1:8000",
            "starting the API server",
        ),
        ("INFO:     Application startup complete.", "asking for a first token"),
        ("(APIServer pid=1) WARNING Enforce eager set, disabling torch.compile, CUDAGraphs", ""),
    ],
)
def test_progress(line: str, step: str) -> None:
    assert log.progress([line]) == step
    assert log.progress([line, "something else"]) == step


@pytest.mark.parametrize(
    ("lines", "says", "code"),
    [
        (
            [
                "ValueError: To serve one request, which is larger than the available KV cache memory (1 GiB).",
                "RuntimeError: Engine core initialization failed.",
            ],
            "KV cache of one request does not fit",
            ExitCode.DOES_NOT_FIT,
        ),
        (["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"], "ran out of memory", 5),
        (["OSError: [Errno 98] Address already in use"], "port is already in use", 78),
        (["vllm serve: error: unrecognized arguments: --task embed"], "does not take this flag", 2),
        (
            [
                "pydantic_core.ValidationError: 1 validation error for VllmConfig",
                "  Value error, Total number of attention heads (2) must be divisible by tensor parallel size (3).",
            ],
            "cannot be divided",
            2,
        ),
        (["  Value error, quantization awx is unknown", "KeyError: 'later'"], "quantization awx is unknown", 78),
    ],
)
def test_the_cause_is_the_first_error_not_the_last(lines: list[str], says: str, code: int) -> None:
    found = log.explain(["INFO fine", *lines], 1, False)
    assert says in found.cause
    assert found.exit_code == code
    assert found.hint


def test_an_end_nobody_asked_for_is_a_failure_even_with_status_0() -> None:
    found = log.explain(["(APIServer pid=1) INFO Shutting down"], 0, True)
    assert found.cause == "the engine ended with status 0 without being asked"
    assert found.exit_code == ExitCode.FAILURE


def test_a_warning_that_quotes_an_error_is_no_cause() -> None:
    warning = (
        "(APIServer pid=1) WARNING 11-21 [utils.py:255] this can cause fd limit errors like `OSError: [Errno 24] x`"
    )
    assert "real one" in log.explain([warning, "ValueError: the real one"], 1, False).cause


def test_a_signal_is_named() -> None:
    assert "SIGKILL" in log.explain([], -9, True).cause
    assert "SIGILL" in log.explain([], -4, False).cause
