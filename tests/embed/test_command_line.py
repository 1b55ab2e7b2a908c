"""`serve embed` from the command to vectors: keys, a rolling restart, a file of services, sites and containers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support import free_port, mdeploy, ps


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of a tiny model only wait for each other where the cores are busy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _embed(url: str, text: str, key: str = "") -> list[float]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    body = json.dumps({"model": "tiny", "input": text}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/embeddings", body, headers), timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    vector: list[float] = found["data"][0]["embedding"]
    return vector


def test_a_service_from_variables_to_its_end(embed_models: Path, torch_python: Path, tmp_path: Path) -> None:
    lines = [f"MODEL_PATH={embed_models / 'qwen3'}", f"PORT={free_port()}", "DEVICE=cpu", "API_KEY=sk-old"]
    (tmp_path / ".env").write_text("\n".join([*lines, "EMBEDDING_DIMENSION=32"]))
    words = ("--name", "tiny", "--python", torch_python, "--batch-tokens", "512", "-d", "--json")
    served = mdeploy("serve", "embed", *words)
    assert served.code == 0, served.stderr
    assert "from .env: API_KEY, PORT, MODEL_PATH, DEVICE, EMBEDDING_DIMENSION" in served.stderr
    url, pid = served.json["service"]["url"], served.json["service"]["pid"]
    assert url.endswith(lines[1].removeprefix("PORT="))
    before = _embed(url, "hello", "sk-old")
    assert len(before) == 32
    with pytest.raises(urllib.error.HTTPError, match="401"):
        _embed(url, "hello")
    new = mdeploy("keys", "rotate", "tiny").stdout.strip()
    restarted = mdeploy("restart", "tiny")
    assert restarted.code == 0, restarted.stderr
    assert "1 of 1 workers are new" in restarted.stderr
    assert _embed(url, "hello", new) == pytest.approx(before, abs=1e-3)
    service = ps("tiny") or {}
    assert (service["phase"], service["kind"], service["pid"]) == ("ready", "embed", pid)
    _exports(tmp_path)
    assert mdeploy("stop", "tiny").code == 0


def _exports(tmp_path: Path) -> None:
    """What it becomes elsewhere: a site that serves its page too, and a container with its model beside it."""
    site = mdeploy("export", "nginx", "tiny", "--listen", "127.0.0.1:8099", "-o", tmp_path / "site.conf")
    assert site.code == 0, site.stderr
    assert "location / {" in (tmp_path / "site.conf").read_text()
    compose = mdeploy("export", "compose", "tiny", "-o", tmp_path / "out")
    assert compose.code == 0, compose.stderr
    text = (tmp_path / "out/compose.yaml").read_text()
    assert "--model=/models/qwen3" in text
    assert "--python" not in text
    assert "[embed]" in next((tmp_path / "out").glob("embed-*.Dockerfile")).read_text()


def test_up_knows_them_and_restarts_what_changed(embed_models: Path, torch_python: Path, tmp_path: Path) -> None:
    entry = {
        "kind": "embed",
        "model": str(embed_models / "bert"),
        "python": str(torch_python),
        "batch_tokens": 512,
        "dtype": "float32",
        "gpus": "none",
    }
    file = tmp_path / "mdeploy.yaml"
    file.write_text(json.dumps({"version": 1, "services": {"tiny": entry}}))
    first = mdeploy("up")
    assert (first.code, "created" in first.stdout) == (0, True), first.stderr
    assert mdeploy("diff").stdout == "tiny: unchanged (ready)\n"
    file.write_text(json.dumps({"version": 1, "services": {"tiny": {**entry, "truncate": True}}}))
    changed = mdeploy("diff")
    assert (changed.code, "truncate" in changed.stdout) == (1, True)
    assert mdeploy("down").code == 0
