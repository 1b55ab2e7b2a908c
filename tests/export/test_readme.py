"""The commands of the section of README about this, typed as they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.vllm_env import VERSION
from tests.fleet import files
from tests.support import free_port, mdeploy, tiny_model
from tests.test_readme import _commands, _sh


@pytest.mark.usefixtures("fake_engine")
def test_the_commands_about_nginx_and_containers(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "org" / "tiny")
    entry = "model: {}, port: {}, auth: {{key: generate}}"
    files.write(tmp_path / "mdeploy.yaml", **{n: entry.format(model, free_port()) for n in ("chat", "tools")})
    assert mdeploy("up").code == 0
    lines = _commands("### Behind nginx, in containers")
    outputs = [_sh(line) for line in lines]
    assert len(lines) == 3
    assert "nginx -t: the site is valid" in outputs[0].stderr
    assert {path.name for path in (tmp_path / "containers").iterdir()} == {
        "compose.yaml",
        f"vllm-cpu-{VERSION}.Dockerfile",
        "wheels",
    }
    assert "kind: PodDisruptionBudget" in (tmp_path / "chat.yaml").read_text()
