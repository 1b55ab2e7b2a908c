"""The command line starts light, and an error is one message, not a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdeploy.cli import main
from tests.support import mdeploy

_HEAVY = {"torch", "vllm", "funasr", "transformers", "modelscope", "modelscope_hub", "fastapi", "uvicorn", "numpy"}
_LATER = {"httpx", "psutil", "yaml", "dotenv", "requests"}


@pytest.mark.parametrize(
    "args", [["--help"], ["ps"], ["ps", "--json"], ["serve", "llm", "--help"], ["bench", "--help"]]
)
def test_start_up_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from mdeploy.cli.main import run; code = run(sys.argv[1:]);"
        "print('\\n'.join(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert not imported & (_HEAVY | _LATER)


def test_help_lists_every_verb() -> None:
    text = mdeploy("--help").stdout
    for verb in main.VERBS:
        assert f" {verb} " in text


def test_version() -> None:
    assert mdeploy("--version").stdout.startswith("mdeploy 0.")


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m mdeploy --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
