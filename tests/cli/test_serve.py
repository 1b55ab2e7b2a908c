"""`serve llm` before anything starts: what it understands, renders and refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mdeploy, ps, tiny_model

DEFAULT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny")


def _cached(tmp_path: Path, model_id: str) -> Path:
    return tiny_model(tmp_path / "cache/models" / model_id.replace("/", "--") / "snapshots/master")


@pytest.mark.usefixtures("gpus")
def test_two_gpus_the_default_model_and_its_recipe(tmp_path: Path) -> None:
    snapshot = _cached(tmp_path, DEFAULT)
    service = mdeploy("serve", "llm", "--tp", "2", "--dry-run", "--json").json["service"]
    command = " ".join(service["argv"])
    assert f"cli.main serve {snapshot} --served-model-name {DEFAULT} deepseek-r1-distill-qwen-1.5b" in command
    assert "--tensor-parallel-size 2" in command
    assert "--max-model-len 2048" in command  # the recipe's 32768, capped by this checkpoint
    assert "--enforce-eager" not in command
    assert service["env"]["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert not {"VLLM_USE_MODELSCOPE", "VLLM_API_KEY"} & set(service["env"])


@pytest.mark.usefixtures("gpus")
def test_gpus_by_number(model: Path) -> None:
    service = mdeploy("serve", "llm", model, "--gpus", "0,2", "--dry-run", "--json").json["service"]
    assert service["env"]["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert service["plan"]["tp"] == 2


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("visible", "chosen"), [("0", "0"), ("2,1", "1"), ("GPU-ccc", "2"), ("0,9,1", "0")])
def test_devices_that_are_not_ours_are_left_alone(model: Path, visible: str, chosen: str) -> None:
    result = mdeploy("serve", "llm", model, "--dry-run", "--json", CUDA_VISIBLE_DEVICES=visible)
    assert result.json["service"]["env"]["CUDA_VISIBLE_DEVICES"] == chosen
    assert mdeploy("serve", "llm", model, "--dry-run", CUDA_VISIBLE_DEVICES="").code == 5


def test_memory_nvidia_smi_does_not_know_is_no_broken_driver() -> None:
    from mdeploy import gpus

    assert gpus._parse("0, GPU-a, NVIDIA GB10, [N/A], [N/A]").free_mib == 0


@pytest.mark.usefixtures("gpus")
def test_auto_does_not_take_a_broken_driver_for_no_gpu(home: Path) -> None:
    result = mdeploy("engines", "install", "vllm", FAKE_SMI_FAILS="1")
    assert result.code == 5
    assert "communicate with the driver" in result.stderr


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--tp", "4"], 5, "this machine has 3"),
        (["--gpus", "7"], 5, "no GPU 7"),
        (["--gpus", "0,0"], 2, "each once"),
        (["--gpus", "a"], 2, "each once"),
        (["--gpus", "0, 0"], 2, "each once"),
        (["--gpus", "²"], 2, "each once"),
        (["--tp", "3"], 2, "4 attention heads"),
        (["--gpu-memory-utilization", "2"], 2, "at most 1"),
    ],
)
def test_wishes_this_machine_cannot_grant(model: Path, args: list[str], code: int, says: str) -> None:
    result = mdeploy("serve", "llm", model, "-d", *args)
    assert result.code == code
    assert says in result.stderr
    assert ps("tiny") is None


@pytest.mark.usefixtures("gpus")
def test_a_broken_driver_is_told_of(model: Path) -> None:
    result = mdeploy("serve", "llm", model, "--dry-run", FAKE_SMI_FAILS="1")
    assert result.code == 5
    assert "communicate with the driver" in result.stderr


def test_without_an_engine_the_command_that_installs_one_is_named(model: Path) -> None:
    result = mdeploy("serve", "llm", model)
    assert result.code == 3
    assert "vLLM is not installed" in result.stderr
    assert "mdeploy engines install vllm" in result.stderr


def _chmodded(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()
    (model / "config.json").symlink_to("/nowhere")


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.usefixtures("fake_engine")
@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["nonsense"], 2, "no hub id"),
        (["a/b/c"], 2, "a/b/c"),
        (["../../etc/passwd"], 3, "no directory"),
        (["/nowhere/model"], 3, "/nowhere/model"),
        (["./nowhere"], 3, "./nowhere"),
        (["MODEL", "--port", "99999"], 2, "between 1 and 65535"),
        (["MODEL", "--port", "0"], 2, "between 1 and 65535"),
        (["MODEL", "--host", "203.0.113.7", "--insecure"], 78, "cannot listen on 203.0.113.7"),
        (["MODEL", "--host", "0.0.0.0"], 2, "--insecure"),
        (["MODEL", "--name", "a/b"], 2, "no service name"),
        (["MODEL", "--max-model-len", "1000000"], 2, "2048"),
        (["MODEL", "--gpus", "0"], 2, "CUDA engine"),
        (["MODEL", "--engine", "vllm@9.9"], 3, "vllm@9.9"),
        (["MODEL", "--nonsense"], 2, "--nonsense"),
        (["MODEL", "--", "--disable-log-requests"], 2, "no flag --disable-log-requests"),
        (["MODEL", "--", "--api-key", "x"], 2, "MDEPLOY_API_KEY"),
        (["recipe.yaml"], 78, "recipe.yaml"),
        (["missing.yaml"], 3, "no recipe"),
        (["key.yaml"], 2, "MDEPLOY_API_KEY"),
        (["env.yaml"], 78, "secrets do not belong in recipes"),
        (["~nosuchuser/x"], 78, "no such user"),
        ([""], 2, "empty"),
        (["MODEL", "--name", ""], 2, "empty"),
        (["MODEL", "--start-timeout", "nan"], 2, "--start-timeout"),
        (["MODEL", "--max-model-len", "0.5"], 2, "number of tokens"),
        (["MODEL", "--", "-pp", "2"], 2, "-pp"),
        (["MODEL", "--restart", "sometimes"], 2, "on-failure"),
        (["MODEL", "--drain", "-1"], 2, "--drain"),
        (["MODEL", "--drain", "inf"], 2, "--drain"),
    ],
)
def test_wrong_input(model: Path, args: list[str], code: int, says: str) -> None:
    (model.parent / "recipe.yaml").write_text("kind: llm\nmodle: a/b\n")
    (model.parent / "key.yaml").write_text("kind: llm\nmodel: a/b\nargs: [--api-key, SECRET]\n")
    (model.parent / "env.yaml").write_text("kind: llm\nmodel: a/b\nenv: {VLLM_API_KEY: SECRET}\n")
    result = mdeploy("serve", "llm", "-d", *(str(model) if word == "MODEL" else word for word in args))
    assert (result.code, "Traceback" in result.stderr) == (code, False), result.stderr
    assert says in result.stderr
    assert "SECRET" not in result.stderr
    assert mdeploy("ps", "--json").json["services"] == []


@pytest.mark.usefixtures("fake_engine")
@pytest.mark.parametrize(
    ("damage", "says"), [(_no_config, "config.json"), (_truncated, "incomplete"), (_chmodded, "config")]
)
def test_damaged_models(model: Path, damage: object, says: str) -> None:
    damage(model)  # type: ignore[operator]
    result = mdeploy("serve", "llm", model, "-d")
    assert result.code == 78
    assert says in result.stderr


@pytest.mark.usefixtures("fake_engine")
def test_unreadable_weights(model: Path) -> None:
    (model / "model.safetensors").chmod(0)
    command = [sys.executable, "-m", "mdeploy", "serve", "llm", str(model), "-d"]
    if os.geteuid() == 0:  # root without the right to read everything
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "cannot read" in done.stderr
    assert "chmod a+r" in done.stderr


@pytest.mark.usefixtures("fake_engine")
@pytest.mark.parametrize("extra", [["--load-format", "dummy"], ["--load_format=dummy"]])
def test_a_shape_can_be_tried_without_weights(model: Path, extra: list[str]) -> None:
    (model / "model.safetensors").unlink()
    assert mdeploy("serve", "llm", model, "--dry-run").code == 78
    assert mdeploy("serve", "llm", model, "--dry-run", "--", *extra).code == 0


@pytest.mark.usefixtures("fake_engine")
def test_a_dry_run_writes_nothing_and_needs_no_model(home: Path) -> None:
    before = sorted(p for p in home.rglob("*"))
    result = mdeploy("serve", "llm", "--dry-run")
    assert result.code == 0, result.stderr
    assert "not downloaded yet" in result.stderr
    assert "--served-model-name" in result.stdout
    assert sorted(p for p in home.rglob("*")) == before


@pytest.mark.usefixtures("fake_engine")
def test_extra_flags_and_recipe_args_reach_vllm_in_order(tmp_path: Path, model: Path) -> None:
    _cached(tmp_path, "a/b")
    recipe = tmp_path / "recipes" / "a" / "b.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("kind: llm\nmodel: a/b\nargs: [--max-num-seqs, '8']\nenv: {VLLM_LOGGING_LEVEL: DEBUG}\n")
    result = mdeploy("serve", "llm", "B", "--dry-run", "--json", "--", "--max-num-seqs", "16")
    service = result.json["service"]
    assert service["argv"][-4:] == ["--max-num-seqs", "8", "--max-num-seqs", "16"]
    assert service["env"]["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.usefixtures("fake_engine")
def test_the_next_free_port_is_taken_unless_one_is_named(model: Path) -> None:
    first = mdeploy("serve", "llm", model, "--name", "one", "-d", "--json").json["service"]
    second = mdeploy("serve", "llm", model, "--name", "two", "-d", "--json").json["service"]
    assert second["port"] > first["port"] >= 8000
    assert {s["phase"] for s in mdeploy("ps", "--json").json["services"]} == {"ready"}


@pytest.mark.usefixtures("fake_engine")
def test_how_it_restarts_and_how_long_it_drains(model: Path) -> None:
    usual = mdeploy("serve", "llm", model, "--dry-run", "--json").json["service"]
    assert (usual["restart"], usual["limits"]["stop_timeout_s"]) == ("on-failure", 30)
    asked = ("--restart", "always", "--drain", "120", "--start-timeout", "60")
    service = mdeploy("serve", "llm", model, *asked, "--dry-run", "--json").json["service"]
    assert (service["restart"], service["limits"]["stop_timeout_s"]) == ("always", 120)
    assert service["limits"]["start_timeout_s"] == 60
    assert service["argv"][-2:] == ["--shutdown-timeout", "108"]


def test_shipped_recipes_are_valid() -> None:
    from mdeploy import recipes
    from mdeploy.paths import Paths

    shipped = recipes.directories(Paths(Path("/nowhere")), Path("/nowhere"))[-1]
    found = sorted(shipped.glob("*/*.yaml"))
    assert len(found) >= 2
    for path in found:
        assert recipes.load(path, (*recipes.LLM, *recipes.EMBEDDING)).model == f"{path.parent.name}/{path.stem}"
