"""A file of services of which some are units: `up`, `down` and `rollback` go through systemd for those."""

from __future__ import annotations

from typing import Any

from tests.systemd.box import Box


def _up(box: Box, **services: dict[str, Any]) -> dict[str, str]:
    result = box.mdeploy("up", "--file", box.file(**services), "--json")
    assert result.code == 0, result.stdout + result.stderr
    return {one["name"]: one["action"] for one in result.json["services"]}


def _manager(box: Box, name: str) -> tuple[str, str]:
    service = box.ps(name) or {}
    return service["phase"], service["manager"]


def test_units_stay_units_when_their_file_changes(box: Box) -> None:
    box.install("chat")
    main_pid = box.shows("chat", "MainPID")
    assert _up(box, chat={}, rag={"depends_on": ["chat"]}) == {"chat": "unchanged", "rag": "created"}
    assert (_manager(box, "chat"), _manager(box, "rag")) == (("ready", "systemd"), ("ready", "detached"))
    assert box.shows("chat", "MainPID") == main_pid
    changed = {"args": ["--max-num-seqs", "3"], "auth": {"key": "generate"}}
    assert _up(box, chat=changed, rag={"depends_on": ["chat"]}) == {"chat": "restarted", "rag": "unchanged"}
    assert _manager(box, "chat") == ("ready", "systemd")
    assert box.shows("chat", "MainPID") != main_pid
    port = (box.ps("chat") or {})["port"]
    assert box.ask(port) == 401
    back = box.mdeploy("rollback", "chat")
    assert back.code == 0, back.stderr
    assert _manager(box, "chat") == ("ready", "systemd")
    assert box.ask(port) == 401
    down = box.mdeploy("down", "--file", box.file(chat={}, rag={"depends_on": ["chat"]}))
    assert down.code == 0, down.stderr
    assert [_manager(box, name)[0] for name in ("chat", "rag")] == ["stopped", "stopped"]
    assert box.shows("chat", "ActiveState") == "inactive"


def test_a_unit_that_does_not_start_with_a_change_can_be_taken_back(box: Box) -> None:
    box.install("chat")
    file = box.file(chat={"env": {"FAKE_VLLM_MODE": "bad-config"}})
    failed = box.mdeploy("up", "--file", file)
    assert failed.code == 78
    assert "quantization method awx" in failed.stderr
    assert "mdeploy rollback chat" in failed.stderr
    assert box.mdeploy("rollback", "chat").code == 0
    assert _manager(box, "chat") == ("ready", "systemd")
