"""Revisions: the last ten and a good one are kept, and none of it holds a key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mdeploy.errors import NotFoundError
from mdeploy.fleet import revisions
from mdeploy.paths import Paths
from mdeploy.specs import Probe, ServiceSpec

SPEC = ServiceSpec("s", "llm", ("/bin/true",), {}, "/", "127.0.0.1", 8000, Probe("/health", "/v1", {"a": 1}), "m")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "h")


def _spec(port: int) -> ServiceSpec:
    return dataclasses.replace(SPEC, port=port)


def _numbers(paths: Paths) -> list[int]:
    return [revision.number for revision in revisions.listing(paths, "s")]


def test_the_last_ten_are_kept_and_the_last_good_one(paths: Paths) -> None:
    revisions.mark_ready(paths, revisions.record(paths, _spec(1), "up"))
    revisions.mark_ready(paths, revisions.record(paths, _spec(2), "up"))
    for port in range(3, 20):
        revisions.record(paths, _spec(port), "up")
    assert _numbers(paths) == [2, *range(10, 20)]
    assert revisions.wanted(paths, _spec(19), None).number == 2


def test_numbers_go_on_after_a_damaged_file(paths: Paths) -> None:
    revisions.record(paths, _spec(1), "up")
    damaged = paths.service("s") / "revisions" / "0007.json"
    damaged.write_text("{")
    assert revisions.record(paths, _spec(2), "up").number == 8
    assert _numbers(paths) == [1, 8]


def test_the_current_one_is_known_by_its_spec_whatever_its_key(paths: Paths) -> None:
    made = revisions.record(paths, SPEC, "up", "/f", {"model": "a/b"})
    keyed = dataclasses.replace(
        SPEC, secrets={"VLLM_API_KEY": "/k"}, probe=dataclasses.replace(SPEC.probe, bearer="VLLM_API_KEY")
    )
    assert revisions.current(paths, SPEC) == revisions.current(paths, keyed) == made
    assert revisions.current(paths, _spec(9)) is None


def test_what_was_never_ready_is_not_gone_back_to(paths: Paths) -> None:
    revisions.record(paths, _spec(1), "up")
    with pytest.raises(NotFoundError, match="no earlier revision") as error:
        revisions.wanted(paths, _spec(2), None)
    assert "1 (never ready)" in error.value.hint
    assert revisions.wanted(paths, _spec(2), 1).spec == _spec(1)


def test_files_are_private(paths: Paths) -> None:
    revisions.record(paths, SPEC, "up")
    directory = paths.service("s") / "revisions"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "0001.json").stat().st_mode & 0o777 == 0o600
