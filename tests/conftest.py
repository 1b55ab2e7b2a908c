"""Every test has its own home and cache, and never sees the caller's keys, proxies or hub."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import isolation, support
from tests.embed.models import embed_models as embed_models  # fixtures for all
from tests.embed.models import minilm as minilm
from tests.fakes import nvidia_smi, vllm_env

_TOGETHER = ("systemd", "examples", "gme")
"""Directories that one process of a parallel run takes whole: they boot a machine, or serve their models once."""

_FOREIGN = ("MODELSCOPE_", "MDEPLOY_", "VLLM_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "OPENAI_")


# A suite started in the background or by nohup inherits ignored signals, and so would every child of ours.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        isolation.isolate()


class _WholeFiles(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """A parallel run shares out whole files, and some directories: their fixtures are dear."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        return file.parent.name if file.parent.name in _TOGETHER else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _WholeFiles:
    return _WholeFiles(config, log)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty MDEPLOY_HOME, the model cache beside it; no process of it outlives the test."""
    for name in list(os.environ):
        if name.upper().startswith(_FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = tmp_path / "home"
    monkeypatch.setenv("MDEPLOY_HOME", str(path))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield path
    if (path / "services").is_dir():
        stopped = support.mdeploy("stop", "--all", MDEPLOY_HOME=str(path))
        assert stopped.code == 0, stopped.stderr
    assert support.processes_with(f"MDEPLOY_HOME={path}") == []


@pytest.fixture
def fake_engine(home: Path, tmp_path: Path) -> Path:
    """A stand-in CPU vLLM, adopted; returns its interpreter."""
    python = vllm_env.make(tmp_path / "fake-vllm")
    result = support.mdeploy("engines", "install", "vllm", "--python", python)
    assert result.code == 0, result.stderr
    return python


@pytest.fixture
def gpus(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs, the first one busy, and a stand-in CUDA vLLM."""
    commands = nvidia_smi.make(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    python = vllm_env.make(tmp_path / "cuda-vllm", vllm_env.VERSION)
    installed = support.mdeploy("engines", "install", "vllm", "--python", python, "--json")
    assert installed.json["variant"] == "cuda"


@pytest.fixture(scope="session")
def engines_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the real vLLM, installed by our own command; kept in ~/.cache by what it was made from."""
    source = (support.REPO / "mdeploy/engines/install.py").read_bytes()
    path = Path.home() / ".cache" / "mdeploy-tests" / hashlib.sha256(source).hexdigest()[:16]
    if not support.mdeploy("engines", "ls", "--json", MDEPLOY_HOME=str(path)).json["engines"]:
        result = support.mdeploy("engines", "install", "vllm", timeout=1200, MDEPLOY_HOME=str(path))
        assert result.code == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def torch_python(engines_home: Path) -> Path:
    """A user's own interpreter, with torch and transformers and without mdeploy: that of the real vLLM."""
    engines = support.mdeploy("engines", "ls", "--json", MDEPLOY_HOME=str(engines_home)).json["engines"]
    return Path(str(engines[0]["python"]))


@pytest.fixture
def real_engine(home: Path, engines_home: Path) -> Path:
    """The real vLLM in this test's own home; returns its interpreter."""
    home.mkdir(exist_ok=True)
    (home / "engines").symlink_to(engines_home / "engines")
    return Path(str(support.mdeploy("engines", "ls", "--json").json["engines"][0]["python"]))
