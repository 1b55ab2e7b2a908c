"""The script that loads embedding services: it runs, and its figures are what they say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.support import REPO


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO / "scripts/bench")


@pytest.mark.alone
def test_the_script_loads_a_service_of_ours(minilm: Path, torch_python: Path) -> None:
    """A short run without peers; what is fast enough is for the script's reader."""
    command = [str(REPO / "scripts/bench/embed"), "--systems", "mdeploy", "--rounds", "1", "--seconds", "0.5"]
    command += ["--connections", "8", "--texts", "32", "--soak", "64", "--batch-tokens", "2048"]
    command += ["--model", str(minilm), "--python", str(torch_python)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["offline"]) >= {"packed", "packed-sorted", "padded-sorted"}
    for load in ("single-8", "many"):
        row = result[load]["mdeploy"]
        assert row["texts_s"] > 0
        assert row["failed"] == {}
        assert set(row["cpu_ms"]) >= {"edge", "worker"}
        assert result["ratios"][f"share_{load}"]["mdeploy"] > 0
    assert min(result["ratios"]["cosine_min"].values()) >= 0.999
    soak = result["soak"]
    assert (soak["failed"], soak["texts"] >= 64, soak["mib_peak"] >= soak["mib_settled"]) == ({}, True, True)


def test_texts_have_the_tokens_they_claim(minilm: Path) -> None:
    from embedding.texts import LONGEST, SHORTEST, corpus

    tokenizer, texts = Tokenizer.from_file(str(minilm / "tokenizer.json")), corpus(minilm, 300)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    assert [len(found.ids) for found in tokenizer.encode_batch([each.text for each in texts])] == [
        each.tokens for each in texts
    ]
    assert len({each.text for each in texts}) == 300
    assert {min(each.tokens for each in texts), max(each.tokens for each in texts)} == {SHORTEST, LONGEST}
    assert corpus(minilm, 300) == texts


def test_a_request_counts_by_the_share_of_its_time_in_the_window() -> None:
    from embedding.online import Answered

    assert Answered(range(1), b"", 4.0, 8.0).within(0.0, 10.0) == 1.0
    assert Answered(range(1), b"", 4.0, 8.0).within(5.0, 10.0) == 0.75
    assert Answered(range(1), b"", 4.0, 8.0).within(5.0, 6.0) == 0.25
    assert Answered(range(1), b"", 4.0, 8.0).within(8.0, 10.0) == 0.0


def test_ratios_are_taken_within_each_round() -> None:
    from embedding.ratios import medians, ratios

    def rows(*tokens: float, p99_ms: float = 1.0, cosine: float = 1.0) -> list[dict[str, object]]:
        common = {"p99_ms": p99_ms, "cosine_min": cosine, "failed": {}}
        return [{"tokens_s": each, "tokens_cpu_s": each, "texts_s": each / 50, **common} for each in tokens]

    measured = {
        "offline": {"packed": rows(100, 50, 90), "packed-2048": rows(80, 60, 100), "st-bf16-16": rows(50, 30, 50)},
        "single-64": {"mdeploy": rows(90, 54, 90, p99_ms=3.0), "vllm": rows(45, 27, 45, p99_ms=6.0, cosine=0.9)},
    }
    found = ratios(measured)
    assert found["share_single-64"] == {"mdeploy": 0.9, "vllm": 0.45}
    assert found["packed_over_st_bf16"] == 2.0
    assert found["single-64_texts_s_over_vllm"] == 2.0
    assert found["single-64_p99_ms_over_vllm"] == 0.5
    assert found["cosine_min"]["vllm"] == 0.9
    assert medians(measured)["offline"]["packed"]["tokens_s"] == 90
