"""The one place that knows vLLM's command line: a plan becomes argv and environment.

vLLM is argv and HTTP, never an import. Which flags an installed version knows is read from
its source with `ast`, in milliseconds, so a flag that rotted away is caught before the start.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from mdeploy.errors import UsageError
from mdeploy.specs import Engine, GpuPlan

_OURS = {
    "--host": "mdeploy serve llm --host",
    "--port": "mdeploy serve llm --port",
    "--model": "mdeploy serve llm MODEL",
    "--served-model-name": "mdeploy serve llm --name (clients may use the hub id as well)",
    "--tensor-parallel-size": "mdeploy serve llm --tp",
    "-tp": "mdeploy serve llm --tp",
    "--tp": "mdeploy serve llm --tp",
    "--api-key": "the environment variable MDEPLOY_API_KEY: a key on a command line is public",
    "--config": "the flags themselves: vLLM drops `false` from such a file",
    "--uds": "--host and --port",
    "--pipeline-parallel-size": "--tp: the plan counts GPUs by it",
    "-pp": "--tp: the plan counts GPUs by it",
    "--data-parallel-size": "one service a GPU, each with its --gpus",
    "-dp": "one service a GPU, each with its --gpus",
    "--shutdown-timeout": "mdeploy serve llm --drain",
    "--ssl-keyfile": "a proxy in front: readiness is asked over http",
    "--ssl-certfile": "a proxy in front: readiness is asked over http",
}
WORK_METRICS = ("vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
"""Counters of /metrics that only the engine core moves; those of requests also count clients who left."""

_QUIET = "--disable-access-log-for-endpoints"
_DRAIN = "--shutdown-timeout"
_SOURCES = ("engine/arg_utils.py", "entrypoints/cli/serve.py", "entrypoints/**/cli_args.py")


def argv(
    engine: Engine,
    model: Path,
    names: Sequence[str],
    host: str,
    port: int,
    plan: GpuPlan,
    extra: Iterable[str],
    drain_s: float = 0.0,
) -> tuple[str, ...]:
    """The full command of `vllm serve`; `names` are what clients may call the model.

    `drain_s` is what requests in flight get to finish once the service is to stop.
    """
    command = [engine.python, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--served-model-name", *names, "--host", host, "--port", str(port)]
    command += ["--tensor-parallel-size", str(plan.tp)] if plan.tp > 1 else []
    command += ["--gpu-memory-utilization", str(plan.util)] if plan.util else []
    command += ["--max-model-len", plan.max_len] if plan.max_len else []
    command += ["--dtype", plan.dtype] if plan.dtype else []
    if plan.device == "cpu":
        command += ["--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(plan.kv_cache_bytes)] if plan.kv_cache_bytes else []
    known = known_flags(engine.python)
    command += [_QUIET, "/health,/metrics"] if _QUIET in known else []
    command += [_DRAIN, str(_shutdown_s(drain_s))] if _DRAIN in known and _shutdown_s(drain_s) else []
    return (*command, *extra)


def _shutdown_s(drain_s: float) -> int:
    """Seconds vLLM may wait for requests: the engine's own end needs a tenth, and a second at least."""
    return max(0, int(drain_s - max(1.0, drain_s / 10)))


def environment(plan: GpuPlan) -> dict[str, str]:
    """What vLLM needs around it: no hub, no usage report, the chosen devices or cores."""
    env = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if plan.device == "cuda":
        return {
            **env,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, plan.indices)),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }
    return {**env, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(plan.threads or 1)}


def check_extra(extra: Sequence[str], known: frozenset[str], version: str) -> None:
    """Refuse flags after `--` that are ours to set or that this vLLM does not have.

    `known` empty means the flags could not be read: then vLLM itself is the judge.
    Raises UsageError naming the flag and the nearest one that exists.
    """
    for word in extra:
        flag = _normal(word.partition("=")[0])
        if flag in _OURS:
            raise UsageError(f"{flag} after -- would override mdeploy", hint=f"use {_OURS[flag]}")
        if not known or not _is_flag(word) or _knows(known, flag):
            continue
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "mdeploy serve llm --help; vLLM's own: vllm serve --help=all"
        raise UsageError(f"vLLM {version} has no flag {flag}", hint=hint)
    if extra and not _is_flag(extra[0]):
        raise UsageError(f"{extra[0]!r} after -- is no flag", hint="after -- come vLLM's own flags")


def loads_no_weights(extra: Sequence[str]) -> bool:
    """True where vLLM is told to make weights up, to try a shape without its checkpoint."""
    words = " ".join(_normal(word) for word in extra).replace("=", " ")
    return "--load-format dummy" in words


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word.lstrip("-")[:1].isdigit() and len(word) > 1


def _normal(flag: str) -> str:
    """vLLM takes underscores for dashes in long names."""
    return "--" + flag[2:].replace("_", "-") if flag.startswith("--") else flag


def _knows(known: frozenset[str], flag: str) -> bool:
    base = flag.split(".")[0]  # --compilation-config.mode sets a key of a JSON flag
    positive = "--" + base.removeprefix("--no-") if base.startswith("--no-") else base
    level = base.startswith("-O") and not base.startswith("--")
    return base in known or positive in known or level


@lru_cache(maxsize=4)
def known_flags(python: str) -> frozenset[str]:
    """Every flag `vllm serve` of this environment takes; empty where its source is not found."""
    package = next(Path(python).parent.parent.glob("lib/python3*/site-packages/vllm"), None)
    if package is None:
        return frozenset()
    files = (path for pattern in _SOURCES for path in sorted(package.glob(pattern)))
    try:
        return frozenset(flag for path in files for flag in _flags_of(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):  # written for a newer Python than ours
        return frozenset()


def _flags_of(source: str) -> Iterable[str]:
    """Literals given to add_argument, and the fields of classes that are turned into flags."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("-"))
        elif isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
            fields = (f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name))
            yield from ("--" + name.replace("_", "-") for name in fields)
