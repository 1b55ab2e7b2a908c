"""`mdeploy cluster` on a machine that is in none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import mdeploy

APP = "from mdeploy import Handler\n\n\nclass X(Handler):\n    def inference(self, request):\n        return 1\n"


@pytest.fixture
def app(home: Path, tmp_path: Path) -> Path:
    """An app's file, on a machine that is in a cluster, as far as its files say."""
    file = tmp_path / "app.py"
    file.write_text(APP)
    part = mdeploy("serve", "app", file, "--dry-run", "--json").json["service"]
    words = ["--address=127.0.0.1:6379", "--ip=127.0.0.1", "--http-port=8009", "--head"]
    _save(
        home,
        {**part, "name": "cluster", "kind": "cluster", "argv": [*part["argv"][:2], "mdeploy.apps.cluster", *words]},
    )
    return file


def _save(home: Path, service: dict[str, Any]) -> None:
    directory = home / "services" / service["name"]
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text(json.dumps(service))


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


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "192.0.2.7", "head", "::1"])
def test_an_address_must_be_one_of_this_machine(address: str) -> None:
    result = mdeploy("cluster", "start", "--address", address)
    assert (result.code, address in result.stderr) == (2, True)


def test_a_token_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    result = mdeploy("cluster", "join", "127.0.0.1", "--token-file", tmp_path / "none")
    assert (result.code, "cannot read the token" in result.stderr) == (78, True)


@pytest.mark.parametrize("port", [80, 8265, 10002, 19999, 52365, 65536])
def test_a_head_takes_no_port_of_rays_own(port: int) -> None:
    pytest.importorskip("ray")
    result = mdeploy("cluster", "start", "--address", "127.0.0.1", "--port", str(port))
    assert (result.code, "--port" in result.stderr) == (2, True)


def test_names_that_no_head_can_have() -> None:
    for address in ("a" * 70, "nosuch.invalid"):
        result = mdeploy("cluster", "join", address)
        assert (result.code, "Traceback" in result.stderr) == (69, False), result.stderr


@pytest.mark.parametrize("share", ["0.001", "1.5", "inf", "nan", "-1"])
def test_a_replica_has_a_part_of_a_gpu_or_whole_ones(app: Path, share: str) -> None:
    asked = ("serve", "app", app, "--cluster", "--dry-run", "--gpus-per-replica")
    assert mdeploy(*asked, "2").code == 0
    result = mdeploy(*asked, share)
    assert (result.code, "--gpus-per-replica" in result.stderr) == (2, True)


def test_no_service_takes_the_name_of_the_machines_part(app: Path) -> None:
    result = mdeploy("serve", "app", app, "--name", "cluster", "--dry-run")
    assert (result.code, "part of a cluster" in result.stderr) == (2, True)


def test_a_service_of_that_name_is_not_written_over(home: Path, app: Path) -> None:
    pytest.importorskip("ray")
    spec = home / "services/cluster/spec.json"
    spec.write_text(spec.read_text().replace('"kind": "cluster"', '"kind": "app"'))
    before = spec.read_text()
    result = mdeploy("cluster", "start", "--address", "127.0.0.1")
    assert (result.code, spec.read_text()) == (78, before)
    assert "a service of another kind is called cluster" in result.stderr


def test_units_of_the_machine_are_refused(home: Path, app: Path) -> None:
    """Each has a /tmp of its own, so that Ray beside it is not to be found."""
    _save(home, mdeploy("serve", "app", app, "--name", "x", "--cluster", "--dry-run", "--json").json["service"])
    for name in ("cluster", "x"):
        result = mdeploy("install-systemd", name, "--dry-run")
        assert (result.code, result.stdout) == (78, "")
        assert f"{name} works in a cluster" in result.stderr
        assert "hint:" in result.stderr
