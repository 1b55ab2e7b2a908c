"""`mdeploy cluster` on a machine that is in none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import mdeploy


@pytest.mark.parametrize("verb", ["status", "stop"])
def test_it_says_that_there_is_none(verb: str) -> None:
    result = mdeploy("cluster", verb)
    assert result.code == 78
    assert "this machine is in no cluster" in result.stderr
    assert "mdeploy cluster start" in result.stderr


def test_serving_on_one_needs_one(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("class X: pass\n")
    result = mdeploy("serve", "app", tmp_path / "app.py", "--cluster", "--dry-run")
    assert (result.code, "in no cluster" in result.stderr) == (78, True)


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.7", "head", "::1"])
def test_an_address_must_be_one_of_this_machine(address: str) -> None:
    result = mdeploy("cluster", "start", "--address", address)
    assert (result.code, address in result.stderr) == (2, True)


def test_a_token_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    result = mdeploy("cluster", "join", "127.0.0.1", "--token-file", tmp_path / "none")
    assert (result.code, "cannot read the token" in result.stderr) == (78, True)
