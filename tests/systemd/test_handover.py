"""A service may write to its own directory; root trusts nothing that it wrote there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError
from mdeploy.specs import Probe, ServiceSpec
from mdeploy.systemd import install
from mdeploy.systemd.host import Host
from tests.systemd.box import HOME, Box

SPEC = ServiceSpec("s", "llm", ("/bin/true",), {}, "/", "127.0.0.1", 8000, Probe("/", "/", {}), "m")
OWN = f"{HOME}/services/s"

_PLANTED = f"""
cd {OWN}
rm -f state.json shm.json log
ln -s /etc/planted state.json
ln -s /etc/planted log
mkfifo supervisor.log
touch json.py log.1
mkdir vllm shm.json
touch vllm/__init__.py
"""


def _as_service(box: Box, script: str) -> int:
    return box.run("setpriv", "--reuid", "mdeploy", "--regid", "mdeploy", "--clear-groups", "sh", "-ec", script).code


def test_nothing_a_service_has_planted_is_there_for_root(box: Box) -> None:
    box.install("s")
    assert box.mdeploy("stop", "s").code == 0
    for script in (f"mkdir {OWN}/revisions/x", f"mv {OWN}/revisions {OWN}/mine", f"rm {OWN}/spec.json"):
        assert _as_service(box, script) != 0
    assert _as_service(box, _PLANTED) == 0
    gone = box.mdeploy("uninstall-systemd", "s")
    assert gone.code == 0, gone.stderr
    assert box.ok("ls", OWN).split() == ["lock", "log.1", "revisions", "spec.json"]
    assert box.ok("find", OWN, "!", "-user", "root") == ""
    assert box.run("ls", "/etc/planted").code == 2


def test_revisions_that_somebody_else_has_made_are_refused(box: Box) -> None:
    box.install("s")
    box.ok("rm", "-r", f"{OWN}/revisions")
    assert _as_service(box, f"ln -s /root {OWN}/revisions") == 0
    result = box.mdeploy("install-systemd", "s")
    assert result.code == 78
    assert f"rm -r {OWN}/revisions" in result.stderr
    assert box.ok("stat", "-c", "%a", "/root").strip() == "700"


def test_no_other_file_than_a_key_is_handed_over(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, secrets={"X": "/root/.ssh/id_rsa"})
    with pytest.raises(ConfigError, match="is not in"):
        install.layout(spec, tmp_path, "system", None, Host(booted=True, version=252))
    spec = dataclasses.replace(SPEC, secrets={"X": f"{tmp_path}/secrets/s.api-key"})
    plan = install.layout(spec, tmp_path, "system", None, Host(booted=True, version=252))
    assert "LoadCredential=s.api-key:" in plan.files[-1].content
