"""What README tells people to type is typed here, in its order, on real parts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import DEMO_MODEL, REPO, copy_model, listens, processes_with, running, tiny_model, until

DEFAULT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def _commands(heading: str) -> list[str]:
    """The console lines below a heading, up to the next one of the same or a higher level."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    level = heading.split()[0]
    body = re.split(rf"^#{{1,{len(level)}}} ", text.split(f"{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"```console\n(.*?)```", body, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def _sh(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one line as a shell does, with our `mdeploy` first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PATH": path, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("real_engine")
def test_the_commands_of_the_sections_use_and_below(tmp_path: Path) -> None:
    copy_model(DEMO_MODEL, tmp_path / "data/models" / DEFAULT)
    mirror, elsewhere = _commands("### Without internet")
    argument = mirror.replace("/data/models", str(tmp_path / "data/models")).split()
    with running(*argument[1:]) as server:
        until(lambda: listens(8700), what="the mirror listens")
        downloaded = _sh(elsewhere.replace("10.0.0.5", "127.0.0.1"))
        assert Path(downloaded.stdout.strip(), "config.json").is_file()
        use = [line for line in _commands("## Use") if line not in (mirror, elsewhere)]
        assert len(use) >= 12
        outputs = {line: _sh(line, MODELSCOPE_ENDPOINT="http://127.0.0.1:8700").stdout for line in use[:9]}
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)
    assert "ready" in outputs["mdeploy ps"]
    assert DEFAULT in outputs["curl -s http://127.0.0.1:8000/v1/models"]
    assert "***" in _sh(_commands("### Addresses and keys")[0]).stdout
    assert "vllm" in _sh("mdeploy engines ls").stdout


@pytest.mark.usefixtures("fake_engine")
def test_the_commands_about_keys_and_logs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "org" / "tiny")
    _sh(f"mdeploy serve llm {model} --name chat -d")
    keys, logs = _commands("### Addresses and keys")[1:], _commands("### Logs")
    outputs = {line: _sh(line).stdout for line in (*keys, *logs)}
    assert outputs["mdeploy keys add chat"].startswith("sk-")
    assert outputs["mdeploy keys rotate chat"].startswith("sk-")
    assert "chat" in outputs["mdeploy keys ls"]
    assert "Application startup complete" in outputs["mdeploy logs chat -t -n 20"]


def test_the_commands_about_your_own_class(tmp_path: Path) -> None:
    lines = _commands("### Your own class")
    assert len(lines) == 7
    outputs = {line: _sh(line).stdout for line in lines}
    assert outputs[lines[2]] == '{"words":2}'
    assert "100 completed" in outputs[lines[3]]
    text = (REPO / "README.md").read_text(encoding="utf-8").split("### Your own class\n")[1]
    (tmp_path / "mdeploy.yaml").write_text("version: 1\n" + re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert "--workers-per-device=2" in _sh("mdeploy up --dry-run").stdout


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("real_engine")
def test_the_commands_about_embeddings(tmp_path: Path, minilm: Path) -> None:
    serve, *lines = _commands("### Embeddings and reranking")
    copy_model(minilm, tmp_path / "models" / serve.split()[3])
    texts = ["a cat", "ein Hund", "三只鸟"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with running("mirror", tmp_path / "models", "--port", "8700") as server:
        until(lambda: listens(8700), what="the mirror listens")
        _sh(serve, MODELSCOPE_ENDPOINT="http://127.0.0.1:8700")
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)
    outputs = {line: _sh(line) for line in lines}
    assert len(outputs) == 6
    assert [len(one["embedding"]) for one in json.loads(outputs[lines[0]].stdout)["data"]] == [384, 384]
    assert "cosine" in outputs[lines[1]].stdout
    assert (tmp_path / "corpus.npy").stat().st_size == 128 + 4 * 384 * len(texts)
    assert "golden" in outputs[lines[3]].stdout
    assert "32 completed" in outputs[lines[4]].stdout


@pytest.mark.usefixtures("gpus")
def test_the_file_of_services_and_its_commands(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache/models" / DEFAULT.replace("/", "--") / "snapshots/master"
    tiny_model(snapshot, max_position_embeddings=131072)
    text = (REPO / "README.md").read_text(encoding="utf-8").split("### Many services in one file\n")[1]
    (tmp_path / "mdeploy.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    outputs = [_sh(line).stdout for line in _commands("### Many services in one file")]
    assert len(outputs) == 4
    assert "CUDA_VISIBLE_DEVICES=1" in outputs[0]
    assert outputs[1].count("created") == 2
    assert outputs[2] == "chat: unchanged (ready)\ntools: unchanged (ready)\n"


def _of_demos() -> set[Path]:
    """Directories that demos have made, those of others too."""
    return set(Path(tempfile.gettempdir()).glob("mdeploy-demo-*"))


@pytest.mark.network
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_quickstart_from_a_fresh_clone_twice(tmp_path: Path, home: Path) -> None:
    assert _commands("## Set up") == ["scripts/quickstart", "scripts/test"]
    clone, before = tmp_path / "clone", _of_demos()
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(clone)], check=True)
    for _ in range(2):
        done = subprocess.run(
            ["scripts/quickstart"], cwd=clone, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "mdeploy takes a ModelScope model to a running service" in done.stdout
        assert "first token (TTFT)" in done.stdout
    assert list((home / "engines").glob("[!.]*"))
    assert processes_with("mdeploy-demo-") == []
    assert _of_demos() == before
