"""GPUs and ports of many services: never two on the same one unasked, and nobody moves without need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import files
from tests.support import mdeploy, ps, running, tiny_model

pytestmark = pytest.mark.usefixtures("gpus")


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "org" / "tiny")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mdeploy.yaml"


def _serve(name: str, *args: str) -> Any:
    return mdeploy("serve", "llm", "org/tiny", "--name", name, "-d", *args)


def _devices(home: Path, name: str) -> str:
    return str(files.spec(home, name)["env"]["CUDA_VISIBLE_DEVICES"])


def _planned(*args: str) -> dict[str, str]:
    result = mdeploy("up", "--dry-run", "--json", *args)
    assert result.code == 0, result.stderr
    return {one["name"]: one["service"]["env"]["CUDA_VISIBLE_DEVICES"] for one in result.json["services"]}


def test_each_serve_gets_a_gpu_of_its_own_until_there_are_none(home: Path) -> None:
    for name, gpu in (("a", "1"), ("b", "2"), ("c", "0")):
        assert _serve(name).code == 0
        assert _devices(home, name) == gpu
    full = _serve("d")
    assert full.code == 5
    assert "GPU 0 belongs to c (running), GPU 1 belongs to a (running), GPU 2 belongs to b (running)" in full.stderr
    assert "mdeploy stop NAME" in full.stderr
    assert "--gpus 0" in full.stderr
    assert ps("d") is None
    shared = _serve("d", "--gpus", "2")
    assert shared.code == 0
    assert "GPU 2 also belongs to b (running)" in shared.stderr
    assert mdeploy("stop", "d", "a").code == 0
    assert _serve("e").code == 0
    assert _devices(home, "e") == "1"


def test_two_serves_at_once_get_different_gpus(home: Path) -> None:
    with (
        running("serve", "llm", "org/tiny", "--name", "a", "-d") as first,
        running("serve", "llm", "org/tiny", "--name", "b", "-d") as second,
    ):
        assert [first.wait(60), second.wait(60)] == [0, 0]
    assert {_devices(home, "a"), _devices(home, "b")} == {"1", "2"}


def test_a_stopped_service_does_not_come_back_onto_a_gpu_that_was_given_away(home: Path) -> None:
    assert _serve("a").code == 0
    assert mdeploy("stop", "a").code == 0
    assert _serve("b").code == 0
    assert (_devices(home, "a"), _devices(home, "b")) == ("1", "1")
    refused = mdeploy("restart", "a")
    assert refused.code == 5
    assert "GPU 1 belongs to b (running) by now" in refused.stderr
    assert mdeploy("stop", "b").code == 0
    assert mdeploy("restart", "a").code == 0


def test_who_was_told_to_share_does_not_keep_the_other_from_starting_again() -> None:
    assert _serve("a").code == 0
    assert _serve("b", "--gpus", "1").code == 0
    assert mdeploy("restart", "a").code == 0
    assert mdeploy("restart", "b").code == 0


def test_a_dry_run_sees_what_is_taken_and_takes_nothing() -> None:
    assert _serve("a").code == 0
    service = mdeploy("serve", "llm", "org/tiny", "--dry-run", "--json").json["service"]
    assert service["env"]["CUDA_VISIBLE_DEVICES"] == "2"
    assert mdeploy("serve", "llm", "org/tiny", "--tp", "4", "--dry-run").code == 5


def test_a_unit_keeps_its_device_while_it_is_stopped(home: Path, tmp_path: Path) -> None:
    assert _serve("a").code == 0
    assert mdeploy("stop", "a").code == 0
    dropin = tmp_path / "config/systemd/user/mdeploy@a.service.d/50-mdeploy.conf"
    dropin.parent.mkdir(parents=True)
    dropin.write_text(f"[X-Mdeploy]\nService={json.dumps({'home': str(home), 'user': ''})}\n")
    asked = ("serve", "llm", "org/tiny", "--name", "b", "--dry-run", "--json")
    kept = mdeploy(*asked, XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert kept.json["service"]["env"]["CUDA_VISIBLE_DEVICES"] == "2"
    assert mdeploy(*asked).json["service"]["env"]["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_file_is_planned_as_a_whole(path: Path) -> None:
    files.write(
        path, any="model: org/tiny", two="model: org/tiny, gpus: {count: 1}", named="model: org/tiny, gpus: [1]"
    )
    assert _planned() == {"any": "2", "two": "0", "named": "1"}
    files.write(path, big="model: org/tiny, tp: 2", named="model: org/tiny, gpus: [1]")
    assert _planned() == {"big": "0,2", "named": "1"}
    assert _planned("big") == {"big": "0,2"}  # the other's GPU is kept for it all the same


def test_a_file_that_does_not_fit_starts_nothing(path: Path) -> None:
    files.write(path, a="model: org/tiny", b="model: org/tiny, gpus: {count: 2}", c="model: org/tiny")
    result = mdeploy("up")
    assert result.code == 5
    assert "mdeploy.yaml:5: services.c: 1 GPU needed, 0 of 3 not in use: " in result.stderr
    assert "belongs to b (in mdeploy.yaml)" in result.stderr
    assert mdeploy("ps", "--json").json["services"] == []


def test_devices_can_be_shared_on_purpose(path: Path) -> None:
    both = "model: org/tiny, gpus: {ids: [2], shared: true}"
    files.write(path, a=both, b=both, c="model: org/tiny")
    assert _planned() == {"a": "2", "b": "2", "c": "1"}


def test_a_changed_service_keeps_its_devices_and_the_others_theirs(home: Path, path: Path) -> None:
    files.write(path, a="model: org/tiny", b="model: org/tiny")
    files.up()
    before = {name: (_devices(home, name), files.spec(home, name)["port"]) for name in "ab"}
    files.write(path, a0="model: org/tiny", a="model: org/tiny, args: [--max-num-seqs, 4]", b="model: org/tiny")
    assert files.actions(files.up()) == {"a0": "created", "a": "restarted", "b": "unchanged"}
    assert {name: (_devices(home, name), files.spec(home, name)["port"]) for name in "ab"} == before
    assert _devices(home, "a0") == "0"


def test_a_stopped_service_moves_where_its_place_was_taken(home: Path, path: Path) -> None:
    files.write(path, a="model: org/tiny")
    files.up()
    assert mdeploy("down").code == 0
    port = files.spec(home, "a")["port"]
    assert _serve("stranger", "--port", str(port)).code == 0
    assert _devices(home, "stranger") == _devices(home, "a") == "1"
    moved = files.up()
    assert files.actions(moved) == {"a": "restarted"}
    changes = {change["key"]: change["old"] for change in moved.json["services"][0]["changes"]}
    assert changes == {"GPUs": "1", "port": str(port)}
    assert _devices(home, "a") == "2"
    assert files.spec(home, "a")["port"] != port
    assert mdeploy("diff").code == 0


def test_services_can_swap_their_devices(home: Path, path: Path) -> None:
    files.write(path, a="model: org/tiny, gpus: [1]", b="model: org/tiny, gpus: [2]")
    files.up()
    files.write(path, a="model: org/tiny, gpus: [2]", b="model: org/tiny, gpus: [1]")
    assert files.actions(files.up()) == {"a": "restarted", "b": "restarted"}
    assert [_devices(home, name) for name in "ab"] == ["2", "1"]


def test_who_chose_nothing_makes_way_for_who_names_a_device(home: Path, path: Path) -> None:
    files.write(path, a="model: org/tiny, depends_on: b", b="model: org/tiny, gpus: [0]")
    files.up()
    assert _devices(home, "a") == "1"
    files.write(path, a="model: org/tiny, depends_on: b", b="model: org/tiny, gpus: [1]")
    moved = files.up()
    assert files.actions(moved) == {"b": "restarted", "a": "restarted"}
    assert "a: stopped first, b takes its place" in moved.stderr
    assert (_devices(home, "a"), _devices(home, "b")) == ("2", "1")
