"""The command line of vLLM: rendered in one place, checked against the version installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mdeploy.errors import UsageError
from mdeploy.llm import command
from mdeploy.specs import Engine, GpuPlan
from tests.fakes import vllm_env

ENGINE = Engine("e", "vllm", "0.32.0", "cuda", "/env/bin/python", True)
KNOWN = frozenset({"--max-num-seqs", "--enable-log-requests", "--compilation-config", "-O", "-q", "--seed"})


def test_the_command_on_two_gpus() -> None:
    plan = GpuPlan("cuda", (1, 3), 2, 0.8, "32768", "bfloat16")
    argv = command.argv(ENGINE, Path("/m"), ("org/m", "m"), "0.0.0.0", 8001, plan, ("--max-num-seqs", "64"))
    assert " ".join(argv) == (
        "/env/bin/python -m vllm.entrypoints.cli.main serve /m --served-model-name org/m m "
        "--host 0.0.0.0 --port 8001 --tensor-parallel-size 2 --gpu-memory-utilization 0.8 "
        "--max-model-len 32768 --dtype bfloat16 --max-num-seqs 64"
    )
    assert command.environment(plan)["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_the_command_on_a_cpu() -> None:
    plan = GpuPlan("cpu", (), 1, None, None, "float32", kv_cache_bytes=1 << 26, threads=3)
    argv = command.argv(ENGINE, Path("/m"), ("m",), "127.0.0.1", 8000, plan, ())
    assert argv[-5:] == ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "67108864")
    env = command.environment(plan)
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("nobind", "3")
    assert "VLLM_USE_MODELSCOPE" not in env


@pytest.mark.parametrize(
    "extra",
    [
        ["--max-num-seqs", "4"],
        ["--max_num_seqs=4"],
        ["--no-enable-log-requests"],
        ["--compilation-config.mode", "3"],
        ["-O3"],
        ["-q", "awq"],
        ["--seed", "-1"],
    ],
)
def test_flags_vllm_knows_pass(extra: list[str]) -> None:
    command.check_extra(extra, KNOWN, "0.32.0")


@pytest.mark.parametrize(
    ("extra", "says", "hint"),
    [
        (["--disable-log-requests"], "no flag --disable-log-requests", "--enable-log-requests"),
        (["--max-num-seq", "4"], "no flag --max-num-seq", "--max-num-seqs"),
        (["--api-key", "secret"], "--api-key", "MDEPLOY_API_KEY"),
        (["--api_key=secret"], "--api-key", "MDEPLOY_API_KEY"),
        (["--port", "1"], "--port", "mdeploy serve llm --port"),
        (["-tp", "2"], "-tp", "--tp"),
        (["--shutdown-timeout", "9"], "--shutdown-timeout", "mdeploy serve llm --drain"),
        (["word"], "no flag", "vLLM's own flags"),
    ],
)
def test_other_flags_are_refused_with_a_way_out(extra: list[str], says: str, hint: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        command.check_extra(extra, KNOWN, "0.32.0")
    assert hint in error.value.hint
    assert "secret" not in error.value.message


def test_health_checks_stay_out_of_the_access_log_where_vllm_can_do_that(tmp_path: Path) -> None:
    engine = dataclasses.replace(ENGINE, python=str(vllm_env.make(tmp_path / "env")))
    argv = command.argv(engine, Path("/m"), ("m",), "::1", 1, GpuPlan("cuda", (0,), 1, None, None, None), ("-q", "awq"))
    assert argv[-4:] == ("--disable-access-log-for-endpoints", "/health,/metrics", "-q", "awq")


@pytest.mark.parametrize(("drain_s", "seconds"), [(600, "540"), (30, "27"), (5.5, "4"), (2, "1"), (1, None), (0, None)])
def test_requests_in_flight_get_their_time_less_what_the_end_itself_takes(
    tmp_path: Path, drain_s: float, seconds: str | None
) -> None:
    engine = dataclasses.replace(ENGINE, python=str(vllm_env.make(tmp_path / "env")))
    one = GpuPlan("cuda", (0,), 1, None, None, None)
    argv = command.argv(engine, Path("/m"), ("m",), "::1", 1, one, (), drain_s)
    assert (argv[-2:] == ("--shutdown-timeout", seconds)) is (seconds is not None)
    assert "--shutdown-timeout" not in command.argv(ENGINE, Path("/m"), ("m",), "::1", 1, one, (), drain_s)


def test_where_flags_cannot_be_read_vllm_is_the_judge(tmp_path: Path) -> None:
    assert command.known_flags(str(tmp_path / "bin/python")) == frozenset()
    command.check_extra(["--anything"], frozenset(), "?")


def test_flags_are_read_from_the_source(tmp_path: Path) -> None:
    python = vllm_env.make(tmp_path / "env")
    assert {"--tensor-parallel-size", "-tp", "--max-num-seqs"} <= command.known_flags(str(python))


@pytest.mark.engine
def test_flags_of_the_real_vllm(real_engine: Path) -> None:
    known = command.known_flags(str(real_engine))
    assert len(known) > 250
    assert {
        "--max-model-len",
        "--kv-cache-memory-bytes",
        "--chat-template",
        "--api-server-count",
        "--host",
        "--shutdown-timeout",
    } <= known
    assert not {"--disable-log-requests", "--swap-space", "--task"} & known
