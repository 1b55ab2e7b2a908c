"""What a compose file says really runs: the words, mounts, key and health check of a model's and an app's container."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests.export import container
from tests.support import REPO, free_port, mdeploy, tiny_model, until

KEY = "sk-for-containers"


def test_a_model_answers_from_its_container(fake_engine: Path, home: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "org" / "tiny")
    served = mdeploy("serve", "llm", model, "--name", "chat", "--port", str(free_port()), "-d", MDEPLOY_API_KEY=KEY)
    assert served.code == 0, served.stderr
    assert mdeploy("stop", "chat").code == 0
    document = yaml.safe_load(mdeploy("export", "compose", "chat").stdout)
    with container.running(document, "chat", fake_engine.parent.parent, tmp_path / "root") as chat:
        until(chat.healthy, what="the container answers")
        (home / "secrets/chat.api-key").write_text("another\n")
        assert not chat.healthy()  # the engine asks for the key it was started with
    log = (tmp_path / "root.log").read_text()
    assert "Application startup complete." in log
    (home / "secrets/chat.api-key").write_text("")
    with container.running(document, "chat", fake_engine.parent.parent, tmp_path / "again") as keyless:
        assert keyless.process.wait(30) != 0  # never without a key


def test_an_app_answers_from_its_container(home: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/echo.py").write_bytes((REPO / "tests/fakes/echo_handler.py").read_bytes())
    app = ("serve", "app", f"{tmp_path}/code/echo.py:Echo", "--name", "echo", "--env", "ECHO_NAME=c")
    served = mdeploy(*app, "--port", str(free_port()), "-d", MDEPLOY_API_KEY=KEY)
    assert served.code == 0, served.stderr
    assert mdeploy("stop", "echo").code == 0
    document = yaml.safe_load(mdeploy("export", "compose", "echo").stdout)
    service = document["services"]["echo"]
    for name, source in service["build"]["additional_contexts"].items():  # what its Dockerfile copies
        service["volumes"].append({"type": "bind", "source": source, "target": f"/app/{name}"})
    with container.running(document, "echo", Path(sys.executable).parent.parent, tmp_path / "root") as echo:
        until(echo.healthy, what="the container answers")
