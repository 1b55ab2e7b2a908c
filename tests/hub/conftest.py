"""One mirror for all tests of the hub; it is read-only, so sharing it is safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import hub


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    hub.make_model(root)
    return root


@pytest.fixture(scope="session")
def hub_url(models: Path) -> Iterator[str]:
    with hub.mirror(models) as url:
        yield url


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK writes a session id to ~/.modelscope."""
    monkeypatch.setenv("HOME", str(tmp_path))
