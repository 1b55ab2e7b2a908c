"""What is wrong with a model directory is known before vLLM is started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError, MdeployError, NotFoundError
from mdeploy.llm import facts
from tests.support import DEMO_MODEL, tiny_model, write_safetensors


def test_facts_of_the_demo_model() -> None:
    known = facts.read(DEMO_MODEL)
    assert (known.architecture, known.dtype, known.chat_template) == ("Qwen2ForCausalLM", "float32", True)
    assert (known.heads, known.kv_heads, known.head_dim) == (4, 2, 32)
    size = (DEMO_MODEL / "model.safetensors").stat().st_size
    assert 0 < size - known.weight_bytes < 20_000  # all but the header


def test_facts_of_a_multimodal_config_come_from_its_text_part(tmp_path: Path) -> None:
    text = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "num_hidden_layers": 5}
    model = tiny_model(tmp_path / "m", text_config={**text, "max_position_embeddings": 77, "dtype": "float16"})
    known = facts.read(model)
    assert (known.heads, known.kv_heads, known.head_dim, known.layers) == (8, 2, 64, 5)
    assert (known.max_len, known.dtype) == (77, "float16")


def test_shards_are_added_up(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    (model / "model.safetensors").unlink()
    write_safetensors(model / "a.safetensors", {"x": 100, "y": 28})
    write_safetensors(model / "b.safetensors", {"z": 72})
    weight_map = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert facts.read(model).weight_bytes == 200
    (model / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"b\.safetensors"):
        facts.read(model)


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def _listed_config(model: Path) -> None:
    (model / "config.json").write_text("[]")


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _html(model: Path) -> None:
    (model / "model.safetensors").write_text("<html>not found</html>" * 10)


def _empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def _directory_for_file(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def _pipe(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


def _gguf(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "m.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"num_attention_heads": "abc"}'),
        ("config.json", '{"text_config": [1]}'),
        ("config.json", '{"architectures": {"a": 1}}'),
        ("config.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
    ],
)
def test_files_of_another_form_are_no_traceback(tmp_path: Path, name: str, content: str) -> None:
    model = tiny_model(tmp_path / "m")
    (model / name).write_text(content)
    with pytest.raises(ConfigError):
        facts.read(model)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_no_config, "config.json"),
        (_broken_config, "not valid JSON"),
        (_listed_config, "JSON object"),
        (_no_weights, "no weights"),
        (_truncated, "incomplete"),
        (_html, "no safetensors"),
        (_empty, "no safetensors"),
        (_directory_for_file, "no regular file"),
        (_pipe, "no regular file"),
        (_gguf, "GGUF"),
    ],
)
def test_a_damaged_model_is_a_configuration_error_with_a_way_out(tmp_path: Path, damage: object, says: str) -> None:
    model = tiny_model(tmp_path / "m")
    damage(model)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=says) as error:
        facts.read(model)
    assert error.value.hint


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        facts.read(tmp_path / "nothing")
    assert issubclass(NotFoundError, MdeployError)
