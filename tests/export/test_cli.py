"""`mdeploy export` as a user types it, on services that were really served."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.vllm_env import VERSION
from tests.fleet import files
from tests.support import REPO, Result, mdeploy, tiny_model

KEY = "sk-never-shown"


@pytest.fixture
def chat(fake_engine: Path, home: Path, tmp_path: Path) -> Path:
    """Services that are known and do not run: `chat` with a key, `open` without one; returns their model."""
    model = tiny_model(tmp_path / "org" / "tiny")
    found = mdeploy("serve", "llm", model, "--name", "chat", "--port", "8101", "--dry-run", "--json")
    assert found.code == 0, found.stderr
    key = home / "secrets/chat.api-key"
    key.parent.mkdir(parents=True)
    key.write_text(f"{KEY}\n")
    key.chmod(0o600)
    _save(home, {**found.json["service"], "secrets": {"VLLM_API_KEY": str(key)}})
    _save(home, {**found.json["service"], "name": "open", "port": 8102})
    return model


def _save(home: Path, service: dict[str, Any]) -> None:
    directory = home / "services" / service["name"]
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text(json.dumps(service))


def _app(home: Path, tmp_path: Path, *options: str) -> None:
    """An app `echo`, known and not running."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/echo.py").write_bytes((REPO / "tests/fakes/echo_handler.py").read_bytes())
    asked = ("serve", "app", f"{tmp_path}/code/echo.py:Echo", "--name", "echo", *options, "--dry-run", "--json")
    found = mdeploy(*asked)
    assert found.code == 0, found.stderr
    _save(home, found.json["service"])


def _compose(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.stderr
    return dict(yaml.safe_load(result.stdout)["services"])


def test_nginx_in_front_of_a_service_and_its_replicas(chat: Path, tmp_path: Path) -> None:
    result = mdeploy("export", "nginx", "chat", "--server", "127.0.0.2:8001", "--listen", "18099", "--check")
    assert result.code == 0, result.stderr
    assert "nginx -t: the site is valid" in result.stderr
    assert "server 127.0.0.1:8101 " in result.stdout
    assert "server 127.0.0.2:8001 " in result.stdout
    only = mdeploy("export", "nginx", "chat", "--server", "10.0.0.6:8000", "--only-servers").stdout
    assert "127.0.0.1:8101" not in only
    private = mdeploy("export", "nginx", "open", "--listen", "127.0.0.1:18099").stdout
    assert "listen 127.0.0.1:18099;" in private


@pytest.mark.parametrize(("flag", "kept"), [("--key-from-service", r"sk\x2dnever\x2dshown"), ("--add-key", KEY)])
def test_keys_are_in_a_private_file_of_their_own(chat: Path, tmp_path: Path, flag: str, kept: str) -> None:
    site, keys = tmp_path / "sites/chat.conf", tmp_path / "sites/chat.key"
    for _ in range(2):  # what is ours is replaced
        result = mdeploy("export", "nginx", "chat", flag, "--listen", "127.0.0.1:18099", "-o", site, "--check")
        assert result.code == 0, result.stderr
    assert kept in keys.read_text()
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert kept not in site.read_text() + result.stdout + result.stderr
    hidden = mdeploy("export", "nginx", "chat", flag, "--listen", "127.0.0.1:18099", "-o", tmp_path / "sites/chat")
    assert ".chat.key" in hidden.stderr


_WRONG = (
    (["nginx", "nosuch"], 3, "no service"),
    (["nginx", "chat", "--server", "nosuch"], 3, "no service"),
    (["nginx", "chat", "--server", "open"], 78, "different keys"),
    (["nginx", "chat", "--server", "10.0.0.6"], 3, "no service"),
    (["nginx", "chat", "--server", "10.0.0.6:x"], 2, "HOST:PORT"),
    (["nginx", "chat", "--server", "127.0.0.1:8101"], 2, "twice"),
    (["nginx", "chat", "--only-servers"], 2, "no server"),
    (["nginx", "chat", "--listen", "8101"], 2, "chat listens there"),
    (["nginx", "chat", "--server-name", "a b"], 2, "host name"),
    (["nginx", "chat", "--tls-cert", "cert.pem"], 2, "belong together"),
    (["nginx", "chat", "--tls-cert", "cert.pem", "--tls-key", "key.pem"], 3, "there is no"),
    (["nginx", "chat", "--tls-cert", "foreign", "--tls-key", "foreign"], 78, "no certificate"),
    (["nginx", "chat", "--add-key"], 2, "-o"),
    (["nginx", "chat", "--add-key", "-o", "x.conf"], 2, "--insecure"),
    (["nginx", "chat", "--add-key", "--insecure", "-o", "x.key"], 2, "for the keys"),
    (["nginx", "cluster"], 2, "kind cluster"),
    (["compose", "cluster"], 2, "kind cluster"),
    (["nginx", "chat", "--add-key", "--key-from-service"], 2, "exclude"),
    (["nginx", "open"], 2, "--insecure"),
    (["nginx", "open", "--key-from-service", "-o", "x.conf"], 78, "no key"),
    (["nginx", "chat", "-o", "foreign"], 2, "not written by mdeploy"),
    (["nginx", "chat", "--server", "nosuch.invalid:80", "--check"], 78, "host not found"),
    (["compose"], 2, "--file"),
    (["compose", "nosuch"], 3, "no service"),
    (["compose", "--file", "nosuch.yaml"], 3, "nosuch.yaml"),
    (["compose", "chat", "-o", "foreign"], 78, "foreign"),
    (["kubernetes", "open"], 2, "no key"),
    (["kubernetes", "chat", "--namespace", "A_b"], 2, "--namespace"),
    (["kubernetes", "chat", "--replicas", "0"], 2, "--replicas"),
)


def test_wrong_input(chat: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("mine\n")
    chat_spec = json.loads((home / "services/chat/spec.json").read_text())
    _save(home, {**chat_spec, "name": "cluster", "kind": "cluster"})
    for args, code, says in _WRONG:
        result = mdeploy("export", *args)
        assert (result.code, "Traceback" in result.stderr) == (code, False), (args, result.stderr)
        assert says in result.stderr, args
        assert KEY not in result.stdout + result.stderr
    assert (tmp_path / "foreign").read_text() == "mine\n"
    assert not (tmp_path / "x.conf").exists()


def test_containers_of_a_model(chat: Path, home: Path, tmp_path: Path) -> None:
    service = _compose(mdeploy("export", "compose", "chat", "open"))["chat"]
    assert service["volumes"][1] == {
        "type": "bind",
        "source": str(chat),
        "target": "/models/tiny",
        "read_only": True,
        "bind": {"create_host_path": False},
    }
    assert str(tmp_path) not in " ".join(service["command"])
    written = mdeploy("export", "compose", "chat", "-o", tmp_path / "out")
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert names == ["compose.yaml", f"vllm-cpu-{VERSION}.Dockerfile", "wheels/mdeploy-0.1.0-py3-none-any.whl"]
    assert KEY not in "".join((tmp_path / "out" / name).read_text() for name in names[:2]) + written.stderr
    documents = list(yaml.safe_load_all(mdeploy("export", "kubernetes", "chat", "-n", "ml", "--replicas", "2").stdout))
    assert [document["kind"] for document in documents] == ["Deployment", "Service", "PodDisruptionBudget"]


def test_services_of_a_file(chat: Path, tmp_path: Path) -> None:
    files.write(tmp_path / "mdeploy.yaml", a=f"model: {chat}", b=f"model: {chat}, depends_on: a")
    services = _compose(mdeploy("export", "compose", "--file", "mdeploy.yaml"))
    assert services["b"]["depends_on"] == {"a": {"condition": "service_healthy"}}
    assert list(_compose(mdeploy("export", "compose", "a", "--file", "mdeploy.yaml"))) == ["a"]


@pytest.mark.usefixtures("gpus")
def test_containers_of_an_app(home: Path, tmp_path: Path) -> None:
    _app(home, tmp_path, "--gpus", "1,2", "--port", "8103", "--env", f"BLOB=/{'A' * 400}")  # looks like a path
    service = _compose(mdeploy("export", "compose", "echo"))["echo"]
    words = service["command"]
    assert [word for word in words if "device=" in word] == ["--device=0", "--device=1"]
    assert "--handler=/app/code/echo.py:Echo" in words
    assert "--host=0.0.0.0" in words
    assert service["build"]["additional_contexts"] == {"code": str(tmp_path / "code")}
    assert mdeploy("export", "kubernetes", "echo").code == 2
    manifest = mdeploy("export", "kubernetes", "echo", "--insecure")
    assert f"--build-context code={tmp_path / 'code'}" in manifest.stdout
    assert mdeploy("export", "nginx", "echo", "--listen", "127.0.0.1:18098", "--check").code == 0


def test_what_hides_beside_the_code_is_told(home: Path, tmp_path: Path) -> None:
    _app(home, tmp_path)
    (tmp_path / "code/.env").write_text("SECRET=1")
    assert "would hold .env of" in mdeploy("export", "compose", "echo").stderr
    (tmp_path / "code/.dockerignore").write_text(".*")
    assert "would hold" not in mdeploy("export", "compose", "echo").stderr


def test_code_beside_everything_else_is_no_image(home: Path, tmp_path: Path) -> None:
    _app(home, tmp_path)
    result = mdeploy("export", "compose", "echo", HOME=str(tmp_path / "code"))
    assert (result.code, "directory of its own" in result.stderr) == (78, True)


def test_a_model_whose_links_lead_elsewhere(chat: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (chat / "extra.json").symlink_to(tmp_path / "blob")
    result = mdeploy("export", "compose", "chat")
    assert (result.code, "cp -rL" in result.stderr) == (78, True)


def test_the_wheel_is_this_mdeploy(chat: Path, tmp_path: Path) -> None:
    assert mdeploy("export", "compose", "chat", "-o", tmp_path / "out").code == 0
    wheel = next((tmp_path / "out/wheels").iterdir())
    target = tmp_path / "installed"
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)
    command = [sys.executable, "-c", "import mdeploy; print(mdeploy.__file__, mdeploy.__version__)"]
    done = subprocess.run(command, env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(target / "mdeploy/__init__.py"), "0.1.0"]
    assert "mdeploy/_recipes/demo/mdeploy-faq.yaml" in zipfile.ZipFile(wheel).namelist()
