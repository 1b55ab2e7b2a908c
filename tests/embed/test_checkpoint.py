"""What a model directory says of itself, and which ones are refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdeploy.apps.embed import checkpoint
from mdeploy.errors import ConfigError

Copy = Callable[[str], Path]


@pytest.fixture
def copy(embed_models: Path, tmp_path: Path) -> Copy:
    """A model that a test may spoil."""
    return lambda name: Path(shutil.copytree(embed_models / name, tmp_path / name))


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    kept = {**json.loads(file.read_text()), **values} if file.exists() else values
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


def test_a_qwen3_embedder_is_pooled_last_cut_to_32_and_wants_instructions(embed_models: Path) -> None:
    found = checkpoint.read(embed_models / "qwen3")
    assert (found.kind, found.pooling, found.dim, found.smallest) == ("embedder", "last", 64, 32)
    assert found.query_prompt is not None
    query = found.query_prompt.format(task=found.instruction, query="")
    assert query == found.prompts["query"]  # its own files write the same prompt
    assert (found.max_length, found.vocabulary) == (512, 262)


def test_a_sentence_transformer_says_how_it_pools_and_how_long_its_texts_are(embed_models: Path) -> None:
    bert, xlmr = (checkpoint.read(embed_models / name) for name in ("bert", "xlmr"))
    assert (bert.pooling, bert.max_length, bert.smallest, bert.query_prompt) == ("mean", 128, None, None)
    assert (xlmr.pooling, xlmr.max_length) == ("cls", 160)


def test_old_models_name_their_settings_by_their_kind(copy: Copy) -> None:
    path = copy("xlmr")
    change(path / "sentence_xlm-roberta_config.json", max_seq_length=96)
    assert checkpoint.read(path).max_length == 96


def test_a_text_is_not_so_long_that_it_changes_how_a_model_turns_places(copy: Copy) -> None:
    path = copy("qwen3")
    change(path / "config.json", rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 300})
    assert checkpoint.read(path).max_length == 300
    older = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 200}
    change(path / "config.json", rope_parameters=None, **older)
    assert checkpoint.read(path).max_length == 200


def test_cross_encoders_and_gme_are_known_by_their_architecture(embed_models: Path) -> None:
    assert checkpoint.read(embed_models / "cross").kind == "cross-encoder"
    assert checkpoint.read(embed_models / "cross-xlmr").kind == "cross-encoder"
    gme = checkpoint.read(embed_models / "gme")
    assert (gme.kind, gme.pooling, gme.dim, gme.max_length) == ("gme", "last", 64, 4096)


def test_weights_are_counted_from_their_headers(embed_models: Path) -> None:
    found = checkpoint.read(embed_models / "bert")
    file = (embed_models / "bert" / "model.safetensors").stat().st_size
    assert 0 < file - found.weight_bytes < 8192
    assert found.parameters * 4 == found.weight_bytes


def test_the_real_minilm(minilm: Path) -> None:
    found = checkpoint.read(minilm)
    assert (found.pooling, found.dim, found.max_length, found.parameters) == ("mean", 384, 256, 22_713_728)


@pytest.mark.parametrize(("name", "pooling"), [("qwen3", "last"), ("bert", "mean"), ("xlmr", "mean")])
def test_without_modules_json_the_architecture_decides(copy: Copy, name: str, pooling: str) -> None:
    path = copy(name)
    (path / "modules.json").unlink()
    assert checkpoint.read(path).pooling == pooling


@pytest.mark.parametrize(("mode", "pooling"), [("lasttoken", "last"), ("mean", "mean"), ("cls", "cls")])
def test_newer_files_name_the_pooling_in_one_word(copy: Copy, mode: str, pooling: str) -> None:
    path = copy("bert")
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": mode}))
    assert checkpoint.read(path).pooling == pooling


def test_sizes_a_model_was_trained_for_are_believed(copy: Copy) -> None:
    path = copy("bert")
    change(path / "config_sentence_transformers.json", matryoshka_dimensions=[64, 32, 16])
    assert checkpoint.read(path).smallest == 16


def test_prompts_and_the_default_one(copy: Copy) -> None:
    path = copy("bert")
    change(path / "config_sentence_transformers.json", prompts={"query": "query: "}, default_prompt_name="query")
    found = checkpoint.read(path)
    assert (found.prompts, found.default_prompt) == ({"query": "query: "}, "query")
    change(path / "config_sentence_transformers.json", default_prompt_name="other")
    with pytest.raises(ConfigError, match="no prompt is called 'other'"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({}, "sigmoid"),
    ],
)
def test_what_makes_a_score_of_what_a_cross_encoder_says(copy: Copy, settings: Any, activation: str) -> None:
    path = copy("cross")
    change(path / "config.json", **settings)
    assert checkpoint.read(path).activation == activation


def test_weights_of_torch_are_taken_if_they_are_whole(copy: Copy) -> None:
    path = copy("bert")
    (path / "model.safetensors").unlink()
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    assert checkpoint.read(path).weight_bytes == (path / "pytorch_model.bin").stat().st_size
    whole = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(whole[:500])
    with pytest.raises(ConfigError, match="cut off"):
        checkpoint.read(path)


def test_a_model_in_parts_needs_all_of_them(copy: Copy) -> None:
    path = copy("bert")
    part = path / "model-00001-of-00001.safetensors"
    (path / "model.safetensors").rename(part)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part.name}}))
    assert checkpoint.read(path).parameters > 0
    part.unlink()
    with pytest.raises(ConfigError, match=r"00001\.safetensors is missing"):
        checkpoint.read(path)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / name).write_text(content)

    return write


def _set(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: change(path / name, **values)


def _cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _dense(path: Path) -> None:
    steps = json.loads((path / "modules.json").read_text())
    steps.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (path / "modules.json").write_text(json.dumps(steps))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("config.json"), "config.json is missing"),
        (_write("config.json", "{"), "config.json cannot be read"),
        (_write("config.json", "[]"), "no JSON object"),
        (_set("config.json", architectures=None), "names no architecture"),
        (_set("config.json", hidden_size="many"), "hidden_size is"),
        (_set("config.json", auto_map={"AutoModel": "modeling.Own"}), "code of its own"),
        (_remove("tokenizer.json"), "save_pretrained"),
        (_remove("model.safetensors"), "no weights"),
        (_cut, "cut off"),
        (_write("model.safetensors", "no header"), "no safetensors file"),
        (_dense, "Dense after the transformer is not supported"),
        (_write("modules.json", "{}"), "names no Transformer"),
        (_set("config_sentence_transformers.json", default_prompt_name=["query"]), "no prompt is called"),
        (_remove("1_Pooling/config.json"), "1_Pooling/config.json is missing"),
        (_set("1_Pooling/config.json", pooling_mode_cls_token=True), "cls_token and mean_tokens is not supported"),
        (_set("1_Pooling/config.json", pooling_mode_mean_tokens=False), "by nothing is not supported"),
        (_set("1_Pooling/config.json", include_prompt=False), "include_prompt"),
        (_set("sentence_bert_config.json", do_lower_case=True), None),  # its tokenizer does that
        (_set("config_sentence_transformers.json", prompts="query: "), "no table of texts"),
        (_set("config_sentence_transformers.json", matryoshka_dimensions=["8"]), "no list of sizes"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(
    copy: Copy, spoil: Callable[[Path], None], message: str | None
) -> None:
    path = copy("bert")
    spoil(path)
    if message is None:
        assert checkpoint.read(path).kind == "embedder"
        return
    with pytest.raises(ConfigError, match=message) as refused:
        checkpoint.read(path)
    assert str(path) in refused.value.message


def test_a_classifier_of_several_labels_is_no_reranker(copy: Copy) -> None:
    path = copy("cross")
    change(path / "config.json", id2label={"0": "no", "1": "yes"})
    with pytest.raises(ConfigError, match="2 labels"):
        checkpoint.read(path)
