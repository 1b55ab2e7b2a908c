"""`mdeploy selftest`: the shipped golden vectors against the real model, and services that are wrong in some way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdeploy.errors import ExitCode
from tests.embed.served import Service, served, standin
from tests.fakes import embedding
from tests.fakes.embed_server import MODEL, vector
from tests.support import REPO, Result, mdeploy

GOLDEN = REPO / "recipes/sentence-transformers/all-MiniLM-L6-v2.golden.json"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, minilm: Path, torch_python: Path) -> Iterator[Service]:
    place, env = tmp_path_factory.mktemp("minilm"), {"OMP_NUM_THREADS": "1"}
    names = ("all-MiniLM-L6-v2",)
    with served(place, minilm, python=torch_python, names=names, env=env, batch_tokens=512, dtype="float32") as found:
        yield found


def statuses(result: Result) -> dict[str, str]:
    return {check["name"]: check["status"] for check in result.json["checks"]}


def detail(result: Result, name: str) -> str:
    return {check["name"]: str(check["detail"]) for check in result.json["checks"]}[name]


@pytest.mark.engine
def test_the_real_model_gives_the_golden_vectors(service: Service, tmp_path: Path) -> None:
    result = mdeploy("selftest", service.url, "--json")
    assert result.code == ExitCode.OK, result.stdout
    found = statuses(result)
    assert "failed" not in found.values()
    assert found["golden vectors"] == "ok" and "at least 0.9999" in detail(result, "golden vectors")
    assert "6 of 6 in English" in detail(result, "paraphrases are closer than strangers")


@pytest.mark.engine
def test_recorded_vectors_are_the_golden_ones(service: Service, tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    assert mdeploy("selftest", service.url, "--record", made).code == 0
    shipped, recorded = (items(path) for path in (GOLDEN, made))
    assert shipped.keys() == recorded.keys()
    for text, numbers in shipped.items():
        assert np.allclose(numbers, recorded[text], atol=1e-4)
    again = mdeploy("selftest", service.url, "--record", made)
    assert again.code == ExitCode.USAGE


def items(path: Path) -> dict[str, Any]:
    return {item["input"]: item["embedding"] for item in json.loads(path.read_text())["items"]}


@pytest.mark.engine
def test_cross_encoders_have_checks_of_their_own(tmp_path: Path, embed_models: Path) -> None:
    with standin(tmp_path / "ranker", embed_models / "cross", env={"STANDIN_SCORES": "1"}) as ranker:
        result = mdeploy("selftest", ranker.url, "--json")
    assert result.code == ExitCode.OK, result.stdout
    assert statuses(result).keys() == {
        "scores do not depend on batch-mates",
        "what fits is ranked before what does not",
    }


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("mates", "batch-mates do not matter"),
        ("norm", "vectors have norm 1"),
        ("order", "order is kept"),
    ],
)
def test_faults_are_found(fault: str, check: str) -> None:
    with embedding.service("--fault", fault) as fake:
        result = mdeploy("selftest", fake.url, "--json")
    assert result.code == ExitCode.INVALID
    found = statuses(result)
    assert found[check] == "failed", found
    assert found["vectors have one size"] == "ok"


def test_vectors_that_are_not_the_golden_ones(tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    with embedding.service() as fake:
        rows = [{"input": text, "embedding": vector(text)} for text in ("one", "two")]
        document = {"schema": 1, "model": MODEL, "dtype": "float32", "how": "by hand", "items": rows}
        golden.write_text(json.dumps(document))
        result = mdeploy("selftest", fake.url, "--golden", golden)
        assert result.code == ExitCode.OK, result.stderr
        assert ["ok", "vectors", "have", "norm", "1"] in [line.split()[:5] for line in result.stdout.splitlines()]
        golden.write_text(json.dumps({**document, "items": [rows[0], {**rows[1], "embedding": vector("three")}]}))
        result = mdeploy("selftest", fake.url, "--golden", golden)
        assert result.code == ExitCode.INVALID and "error: failed: golden vectors" in result.stderr


def test_a_file_that_is_no_golden_one(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"schema": 2}')
    with embedding.service() as fake:
        result = mdeploy("selftest", fake.url, "--golden", wrong)
        assert result.code == ExitCode.CONFIG and "no file of golden vectors: schema 2" in result.stderr
        wrong.write_text('{"schema": 1, "model": "m", "dtype": "float32", "how": "", "items": []}')
        result = mdeploy("selftest", fake.url, "--golden", wrong)
        assert result.code == ExitCode.CONFIG and "it has no items" in result.stderr
        result = mdeploy("selftest", fake.url, "--golden", tmp_path / "gone.json")
        assert result.code == ExitCode.NOT_FOUND
