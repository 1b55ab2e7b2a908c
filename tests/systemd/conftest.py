"""One booted system for all tests that need one: a boot is quick, a stand-in engine is not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.systemd.box import Box, booted


@pytest.fixture(scope="session")
def shared_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A real systemd with a stand-in engine and a tiny model in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can boot a systemd in namespaces")
    with booted(tmp_path_factory.mktemp("box")) as box:
        yield box


@pytest.fixture
def box(shared_box: Box) -> Iterator[Box]:
    """The shared system; whatever a test installed, served or wrote for its units is taken out again."""
    yield shared_box
    shared_box.clean()
