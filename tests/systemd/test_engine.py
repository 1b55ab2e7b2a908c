"""Real vLLM as a service of a real systemd: it runs in the sandbox, survives the death of its core, stops clean."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import DEMO_MODEL, mdeploy
from tests.systemd.box import Box


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_real_vllm_in_the_sandbox(box: Box, engines_home: Path) -> None:
    engine = mdeploy("engines", "ls", "--json", MDEPLOY_HOME=str(engines_home)).json["engines"][0]["python"]
    box.ok("cp", "-r", str(DEMO_MODEL), "/srv/demo")
    adopted = box.mdeploy("engines", "install", "vllm", "--python", engine)
    assert adopted.code == 0, adopted.stderr
    name = adopted.stdout.split()[0]
    file = box.file(real={"model": "/srv/demo", "engine": name, "port": 8070})
    result = box.mdeploy("install-systemd", "--file", file, "--json", timeout=300, MDEPLOY_API_KEY="sk-real")
    assert result.code == 0, result.stderr
    assert box.ask(8070, "sk-real", "real") == 200
    assert box.ask(8070) == 401
    record = box.state("real")
    uids = {box.ok("ps", "-o", "user=", "-p", str(pid)).strip() for pid in box.processes(record["run_id"])}
    assert uids == {"mdeploy"}
    assert box.shows("real", "ProtectSystem") == "strict"
    core = [pid for pid in box.processes(record["run_id"]) if pid != record["engine_pid"]]
    box.ok("kill", "-9", *map(str, core))
    box.ready("real", after=record["run_id"], seconds=240)
    assert box.ask(8070, "sk-real", "real") == 200
    last = box.state("real")["run_id"]
    assert box.mdeploy("stop", "real").code == 0
    assert box.processes(last) == []
    assert box.mdeploy("engines", "rm", name).code == 0
    box.ok("rm", "-r", "/srv/demo")
