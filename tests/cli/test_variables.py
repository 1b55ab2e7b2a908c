"""The variables of servers from before mdeploy: where they count, what they mean, and that a key stays a secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mdeploy import prepare, settings, variables
from mdeploy.apps.embed.options import parse
from mdeploy.errors import ConfigError
from mdeploy.prepare_embed import EmbedRequest
from mdeploy.resolve import Wanted
from mdeploy.specs import EmbedWish
from mdeploy.variables import Flags, Variables
from tests.cli import embed_dirs
from tests.fakes import torch_env
from tests.support import REPO, free_port, listens, mdeploy, running, until

NOTHING = Flags(port=False, model=False, gpus=False, dimensions=False)


def _read(kind: str = "embed", flags: Flags = NOTHING) -> Variables:
    return variables.read(settings.load(), kind, flags)


def test_a_file_beside_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "warning")
    lines = ["API_KEY=sk-hidden", "PORT=6008", "MODEL_PATH=./m", "DEVICE=cpu", "EMBEDDING_DIMENSION=32"]
    (tmp_path / ".env").write_text("\n".join([*lines, "BATCH_SIZE=24", "LOG_LEVEL=DEBUG", "GME_MODEL_DIR=/m"]))
    found = _read()
    assert (found.port, found.model, found.gpus, found.dimensions, found.root) == (6008, "./m", "none", 32, None)
    assert found.settings.get("api_key") == "sk-hidden"
    assert not found.access_log
    first = "from environment: LOG_LEVEL; .env: API_KEY, PORT, MODEL_PATH, DEVICE, EMBEDDING_DIMENSION"
    assert found.told[0] == first
    assert "BATCH_SIZE is not used" in found.told[1]
    gme = _read("gme")
    assert (gme.root, gme.model) == ("/m", None)


def test_flags_and_settings_of_our_own_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("API_KEY=sk-a\nPORT=x\nMODEL_PATH=m\nDEVICE=tpu\nEMBEDDING_DIMENSION=x\n")
    monkeypatch.setenv("MDEPLOY_API_KEY", "sk-ours")
    monkeypatch.setenv("API_KEY", "sk-b")
    found = _read(flags=Flags(port=True, model=True, gpus=True, dimensions=True))
    assert (found.port, found.model, found.gpus, found.dimensions, found.told) == (None, None, None, None, ())
    assert found.settings.get("api_key") == "sk-ours"
    assert "API_KEY" not in os.environ, "no worker needs it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "66000"),
        ("PORT", "8e3"),
        ("DEVICE", "tpu"),
        ("DEVICE", "cuda:9"),
        ("EMBEDDING_DIMENSION", "-1"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_value_that_makes_no_sense(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        _read()


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda", "", (None, 1)),
        ("cuda:1", "", ((1,), None)),
        ("cuda:1", "2,0", ((0,), None)),
        ("cpu", "2", ("none", None)),
        ("auto", "2", (None, None)),
    ],
)
def test_devices(device: str, visible: str, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # given back after the test
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / ".env").write_text(f"DEVICE={device}\n" + (f"CUDA_VISIBLE_DEVICES={visible}\n" if visible else ""))
    found = _read()
    assert (found.gpus, found.gpu_count) == expected


def test_the_key_goes_where_every_key_goes_and_only_embedding_services_look(tmp_path: Path) -> None:
    python = torch_env.make(tmp_path / "env")
    embed_dirs.make(tmp_path / "m", embed_dirs.QWEN3)
    (tmp_path / ".env").write_text("API_KEY=sk-hidden\nPORT=6008\nMODEL_PATH=m\nOMP_NUM_THREADS=5\n")
    shown = mdeploy("serve", "embed", "--python", python, "--dry-run", "--json", "--host", "0.0.0.0")
    assert shown.code == 0, shown.stderr
    assert "sk-hidden" not in shown.stdout + shown.stderr
    service = shown.json["service"]
    assert (service["secrets"], service["port"]) == ({"MDEPLOY_API_KEYS_FILE": "***"}, 6008)
    assert service["env"]["OMP_NUM_THREADS"] == "5"
    (tmp_path / "app.py").write_text("from mdeploy import Handler\nclass A(Handler):\n    example = 1\n")
    other = mdeploy("serve", "app", "app.py:A", "--dry-run", "--json")
    assert (other.json["service"]["secrets"], other.json["service"]["port"] == 6008) == ({}, False)


def test_a_directory_of_models(tmp_path: Path) -> None:
    python = torch_env.make(tmp_path / "env")
    words = ("serve", "gme", "--python", python, "--dry-run", "--json")
    root = tmp_path / "models"
    missing = mdeploy(*words, GME_MODEL_DIR=str(root))
    assert "is not downloaded yet" in missing.stderr
    there = f"{root}/iic/gme-Qwen2-VL-2B-Instruct"
    assert parse(missing.json["service"]["argv"][4:]).model == there
    embed_dirs.make(root / "iic/gme-Qwen2-VL-2B-Instruct", embed_dirs.GME)
    found = mdeploy(*words, GME_MODEL_DIR="models")
    assert "downloaded" not in found.stderr
    options = parse(found.json["service"]["argv"][4:])
    assert (options.model, options.names[0]) == (there, "iic/gme-Qwen2-VL-2B-Instruct")


def test_a_directory_of_models_gets_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, port, root = "iic/gme-Qwen2-VL-2B-Instruct", free_port(), tmp_path / "models"
    embed_dirs.make(tmp_path / "hub" / name, embed_dirs.GME)
    wish = EmbedWish(python=str(torch_env.make(tmp_path / "env")))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{port}")
    with running("mirror", tmp_path / "hub", "--port", str(port)) as hub:
        until(lambda: listens(port), what="the hub listens")
        request = EmbedRequest("gme", Wanted(name, root=str(root)), wish)
        spec = prepare.prepare(settings.load(), request, dry_run=False, progress=None, say=lambda text: None)
        hub.terminate()
        hub.communicate(timeout=20)
    assert f"--model={root / name}" in spec.argv
    assert (root / name / "model.safetensors").is_file()
    assert not (tmp_path / "cache/models").exists()


def test_the_example_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text((REPO / ".env.example").read_text(encoding="utf-8"))
    found = _read("gme")
    assert (found.port, found.model, found.gpus, found.access_log) == (6008, "Qwen/Qwen3-Embedding-4B", None, True)
