"""Every test has its own home and cache, and never sees the caller's keys, proxies or hub."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOREIGN = (
    "MODELSCOPE_",
    "MDEPLOY_",
    "VLLM_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "OPENAI_",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MDEPLOY_HOME; the model cache beside it."""
    import os

    for name in list(os.environ):
        if name.upper().startswith(_FOREIGN):
            monkeypatch.delenv(name)
    path = tmp_path / "home"
    monkeypatch.setenv("MDEPLOY_HOME", str(path))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return path
