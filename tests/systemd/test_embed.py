"""An embedding service as a unit: its model and the interpreter of its workers lie in a home, and it sees no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.box import Box

PLACE = "/root/bert"
ASK = """
import sys, urllib.request
body = b'{"model": "texts", "input": ["a", "b"]}'
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + sys.argv[1]}
request = urllib.request.Request("http://127.0.0.1:8000/v1/embeddings", body, headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.fixture
def unit(shared_box: Box, embed_models: Path, torch_python: Path) -> Iterator[Box]:
    shared_box.ok("cp", "-r", embed_models / "bert", PLACE)
    shared_box.ok("chmod", "-R", "a+rX", PLACE)
    entry = {
        "kind": "embed",
        "model": PLACE,
        "python": str(torch_python),
        "port": 8000,
        "batch_tokens": 512,
        "env": {"OMP_NUM_THREADS": "1"},
        "auth": {"key": "generate"},
    }
    file = shared_box.file(texts=entry)
    installed = shared_box.mdeploy("install-systemd", "--file", file, "--json", timeout=240)
    assert installed.code == 0, installed.stdout + installed.stderr
    yield shared_box
    shared_box.clean()
    shared_box.ok("rm", "-r", PLACE)


def test_it_embeds_from_a_sandbox_and_replaces_its_workers(unit: Box) -> None:
    key = unit.ok("head", "-n1", "/var/lib/mdeploy/secrets/texts.api-key").strip()
    assert [len(item["embedding"]) for item in json.loads(unit.python(ASK, key))["data"]] == [64, 64]
    before = unit.ready("texts")
    restarted = unit.mdeploy("restart", "texts", timeout=240)
    assert restarted.code == 0, restarted.stderr
    assert "1 of 1 workers are new" in restarted.stderr
    assert unit.ready("texts")["run_id"] == before["run_id"]
    assert unit.shows("texts", "User") == "mdeploy"
