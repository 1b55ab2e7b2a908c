"""A file made true and taken back, with a stand-in engine: only what changed is restarted, nothing half done."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.fleet import files
from tests.support import (
    DEMO_MODEL,
    copy_model,
    free_port,
    listens,
    mdeploy,
    processes_with,
    ps,
    running,
    tiny_model,
    until,
)

pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "org" / "tiny")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mdeploy.yaml"


def test_dependencies_come_up_first_and_go_down_last(home: Path, path: Path) -> None:
    files.write(path, rag="model: org/tiny, depends_on: [chat, mail]", mail="model: org/tiny", chat="model: org/tiny")
    first = mdeploy("up")
    assert first.code == 0, first.stderr
    started = re.findall(r"^(\w+): starting", first.stderr, re.MULTILINE)
    assert sorted(started[:2]) == ["chat", "mail"]
    assert started[2] == "rag"
    assert files.spec(home, "rag")["depends_on"] == ["chat", "mail"]
    ports = [s["port"] for s in mdeploy("ps", "--json").json["services"] if s["phase"] == "ready"]
    assert len(set(ports)) == 3
    down = mdeploy("down", "chat")
    assert down.stderr.splitlines() == ["rag stopped", "chat stopped"]
    assert (ps("mail") or {})["phase"] == "ready"
    assert mdeploy("down").stderr.splitlines()[0] == "rag was not running"
    assert {s["phase"] for s in mdeploy("ps", "--json").json["services"]} == {"stopped"}


def test_only_what_changed_is_restarted_and_keeps_its_port(home: Path, path: Path) -> None:
    files.write(path, one="model: org/tiny", two="model: org/tiny")
    assert files.actions(files.up()) == {"one": "created", "two": "created"}
    before = {name: files.state(home, name)["run_id"] for name in ("one", "two")}
    ports = {name: files.spec(home, name)["port"] for name in ("one", "two")}
    assert files.actions(files.up()) == {"one": "unchanged", "two": "unchanged"}
    assert mdeploy("diff").code == 0
    files.write(path, one="model: org/tiny", two="model: org/tiny, args: [--max-num-seqs, 8]")
    different = mdeploy("diff")
    assert different.code == 1
    assert different.stdout == "one: unchanged (ready)\ntwo: changed (ready)\n  args: - → --max-num-seqs 8\n"
    changed = mdeploy("diff", "--json").json["services"][1]
    assert changed["changes"] == [{"key": "args", "old": None, "new": "--max-num-seqs 8"}]
    assert files.actions(files.up()) == {"one": "unchanged", "two": "restarted"}
    assert files.state(home, "one")["run_id"] == before["one"]
    assert files.state(home, "two")["run_id"] != before["two"]
    assert {name: files.spec(home, name)["port"] for name in ("one", "two")} == ports
    assert files.spec(home, "two")["argv"][-2:] == ["--max-num-seqs", "8"]


def test_what_stopped_or_died_is_started_as_it_was(home: Path, path: Path) -> None:
    files.write(path, one="model: org/tiny, lifecycle: {restart: never}", two="model: org/tiny")
    files.up()
    assert mdeploy("stop", "two").code == 0
    os.kill(files.state(home, "one")["engine_pid"], signal.SIGKILL)
    until(lambda: (ps("one") or {})["phase"] == "failed", what="the death is seen")
    specs = [files.spec(home, name) for name in ("one", "two")]
    assert files.actions(files.up()) == {"one": "started", "two": "started"}
    assert [files.spec(home, name) for name in ("one", "two")] == specs
    assert files.actions(files.up("one")) == {"one": "unchanged"}


def test_nothing_is_touched_where_anything_is_wrong(home: Path, path: Path) -> None:
    files.write(
        path,
        good="model: org/tiny",
        flag="model: org/tiny, args: [--max-num-seq, 8]",
        gone="model: ./nowhere",
        engine="model: org/tiny, engine: vllm@9.9",
        open="model: org/tiny, host: 0.0.0.0",
        key="model: org/tiny, auth: {key: env:NOT_SET_ANYWHERE}",
    )
    result = mdeploy("up")
    assert result.code == 2
    for line, name, says in (
        (4, "flag", "no flag --max-num-seq"),
        (5, "gone", "no directory ./nowhere"),
        (6, "engine", "vllm@9.9"),
        (7, "open", "no API key"),
        (8, "key", "$NOT_SET_ANYWHERE"),
    ):
        assert re.search(rf"mdeploy.yaml:{line}: services.{name}: .*{re.escape(says)}", result.stderr)
    assert not (home / "services" / "good").exists()


def test_a_damaged_model_is_found_before_anything_starts(home: Path, path: Path, model: Path) -> None:
    tiny_model(path.parent / "org" / "bad")
    (path.parent / "org" / "bad" / "config.json").unlink()
    files.write(path, good="model: org/tiny", bad="model: org/bad")
    result = mdeploy("up")
    assert result.code == 78
    assert "mdeploy.yaml:4: services.bad: " in result.stderr
    assert "no config.json" in result.stderr
    assert ps("good") is None


def test_a_port_that_is_taken_is_found_before_anything_starts(path: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        files.write(path, good="model: org/tiny", bad=f"model: org/tiny, port: {other.getsockname()[1]}")
        result = mdeploy("up")
    assert result.code == 78
    assert "Address already in use" in result.stderr
    assert ps("good") is None


def test_a_failure_stops_what_depends_on_it_and_nothing_else(home: Path, path: Path) -> None:
    files.write(
        path,
        chat="model: org/tiny, env: {FAKE_VLLM_MODE: bad-config}",
        rag="model: org/tiny, depends_on: chat",
        web="model: org/tiny, depends_on: rag",
        mail="model: org/tiny",
    )
    result = mdeploy("up", "--json")
    assert result.code == 78
    assert files.actions(result) == {"chat": "failed", "mail": "created", "rag": "skipped", "web": "skipped"}
    errors = {one["name"]: one["error"] for one in result.json["services"]}
    assert "quantization method awx" in errors["chat"]["message"]
    assert errors["web"]["message"] == "web was not started: it needs rag"
    assert "error: rag was not started: it needs chat" in result.stderr
    assert (ps("mail") or {})["phase"] == "ready"
    assert ps("rag") is None


def test_what_runs_unchanged_goes_on_beside_a_dependency_that_failed(path: Path) -> None:
    rest = {"rag": "model: org/tiny, depends_on: chat", "web": "model: org/tiny, depends_on: chat"}
    files.write(path, chat="model: org/tiny", **rest)
    files.up()
    rest["web"] += ", args: [--max-num-seqs, 2]"
    files.write(path, chat="model: org/tiny, env: {FAKE_VLLM_MODE: bad-config}", **rest)
    result = mdeploy("up", "--json")
    assert files.actions(result) == {"chat": "failed", "rag": "unchanged", "web": "skipped"}
    assert "web was not restarted: it needs chat" in result.stderr
    assert [(ps(name) or {})["phase"] for name in ("chat", "rag", "web")] == ["failed", "ready", "ready"]


def test_a_change_that_fails_is_told_and_can_be_taken_back(home: Path, path: Path) -> None:
    files.write(path, chat="model: org/tiny")
    files.up()
    good = files.spec(home, "chat")
    files.write(path, chat="model: org/tiny, env: {FAKE_VLLM_MODE: no-kv}")
    failed = mdeploy("up")
    assert failed.code == 5
    assert "mdeploy rollback chat" in failed.stderr
    back = mdeploy("rollback", "chat", "--json")
    assert back.code == 0, back.stderr
    assert (back.json["service"]["action"], back.json["service"]["revision"]) == ("rolled back", 3)
    assert files.spec(home, "chat") == good
    assert (ps("chat") or {})["phase"] == "ready"
    again = mdeploy("rollback", "chat")
    assert again.code == 3
    assert "there are 1, 2 (never ready), 3" in again.stderr
    assert mdeploy("diff").stdout.splitlines()[1] == "  env.FAKE_VLLM_MODE: - → no-kv"


def test_rollback_goes_back_and_forth_and_to_a_number(home: Path, path: Path) -> None:
    for size in ("1", "2", "3"):
        files.write(path, chat=f"model: org/tiny, args: [--max-num-seqs, {size}]")
        files.up()

    def size_after(*args: str) -> str:
        result = mdeploy("rollback", "chat", *args)
        assert result.code == 0, result.stderr
        return str(files.spec(home, "chat")["argv"][-1])

    assert size_after() == "2"
    assert size_after() == "3"
    assert size_after("--to", "1") == "1"
    assert mdeploy("rollback", "chat", "--to", "99").code == 3
    assert mdeploy("rollback", "nobody").code == 3
    numbers = sorted(p.stem for p in (home / "services/chat/revisions").iterdir())
    assert numbers == ["0001", "0002", "0003", "0004", "0005", "0006"]


def test_a_rollback_that_cannot_work_leaves_the_service_alone(home: Path, path: Path) -> None:
    files.write(path, chat=f"model: org/tiny, port: {free_port()}")
    files.up()
    first = files.spec(home, "chat")["port"]
    files.write(path, chat=f"model: org/tiny, port: {free_port()}")
    files.up()
    run_id = files.state(home, "chat")["run_id"]
    import socket

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", first))
        other.listen()
        result = mdeploy("rollback", "chat")
    assert result.code == 78
    assert "Address already in use" in result.stderr
    assert (files.state(home, "chat")["run_id"], (ps("chat") or {})["phase"]) == (run_id, "ready")


def test_what_was_served_by_hand_is_taken_over_and_can_come_back(home: Path, path: Path, model: Path) -> None:
    assert mdeploy("serve", "llm", model, "--name", "chat", "-d", "--", "--max-num-seqs", "7").code == 0
    files.write(path, chat="model: org/tiny")
    assert "made by hand" in mdeploy("diff").stdout
    assert files.actions(files.up()) == {"chat": "restarted"}
    assert mdeploy("rollback", "chat").code == 0
    assert files.spec(home, "chat")["argv"][-2:] == ["--max-num-seqs", "7"]


def test_what_left_the_file_is_reported_and_runs_on(path: Path) -> None:
    files.write(path, old="model: org/tiny", new="model: org/tiny")
    files.up()
    files.write(path, new="model: org/tiny")
    result = files.up()
    assert [one["name"] for one in result.json["gone"]] == ["old"]
    assert "mdeploy stop old" in result.stderr
    assert (ps("old") or {})["phase"] == "ready"
    assert mdeploy("diff").code == 1
    assert mdeploy("stop", "old").code == 0
    assert mdeploy("diff").stdout == "new: unchanged (ready)\n"


def test_another_file_is_another_matter(path: Path) -> None:
    files.write(path, one="model: org/tiny")
    other = files.write(path.with_name("other.yaml"), two="model: org/tiny")
    files.up()
    assert files.up("-f", str(other)).json["gone"] == []


def test_a_dry_run_touches_nothing(home: Path, path: Path) -> None:
    files.write(path, one="model: org/tiny, auth: {key: generate}", two="model: q/w, depends_on: one")
    before = sorted(home.rglob("*"))
    result = mdeploy("up", "--dry-run")
    assert result.code == 0, result.stderr
    assert "q/w is not downloaded yet" in result.stderr
    assert "VLLM_API_KEY=***" in result.stdout
    planned = mdeploy("up", "--dry-run", "--json").json["services"]
    assert len({one["service"]["port"] for one in planned}) == 2
    assert sorted(home.rglob("*")) == before


def test_ctrl_c_keeps_what_is_ready_and_stops_what_was_starting(home: Path, path: Path) -> None:
    files.write(
        path, one="model: org/tiny", two="model: org/tiny, depends_on: one, env: {FAKE_VLLM_MODE: never-answers}"
    )
    with running("up") as process:
        until(lambda: (s := ps("two")) and s["phase"] == "starting" and files.state(home, "two")["engine_pid"])
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert (ps("one") or {})["phase"] == "ready"
    assert (ps("two") or {})["phase"] == "stopped"
    assert processes_with(f"MDEPLOY_RUN_ID={files.state(home, 'two')['run_id']}") == []
    assert not (home / "services/.claims/two").exists()


def test_two_ups_at_once_are_as_good_as_one(home: Path, path: Path) -> None:
    files.write(path, one="model: org/tiny", two="model: org/tiny")
    with running("up", "--json") as first, running("up", "--json") as second:
        outcomes = [process.communicate(timeout=100) for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0]
    assert sorted(out.count('"unchanged"') for out, _ in outcomes) == [0, 2]
    assert sum("waiting for it" in err for _, err in outcomes) == 1
    assert {len(list((home / "services" / name / "revisions").iterdir())) for name in ("one", "two")} == {1}


def test_a_service_that_somebody_is_starting_is_waited_for(home: Path, path: Path, tmp_path: Path) -> None:
    files.write(path, one="model: org/tiny")
    files.up()
    assert mdeploy("stop", "one").code == 0
    with running("restart", "one") as process:
        until(lambda: (ps("one") or {})["phase"] != "stopped", what="the restart has begun")
        assert files.actions(files.up())["one"] in ("unchanged", "started")
        process.communicate(timeout=60)
    assert (ps("one") or {})["phase"] == "ready"


def test_services_can_swap_their_ports(home: Path, path: Path) -> None:
    one, two = free_port(), free_port()
    files.write(path, a=f"model: org/tiny, port: {one}", b=f"model: org/tiny, port: {two}")
    files.up()
    files.write(path, a=f"model: org/tiny, port: {two}", b=f"model: org/tiny, port: {one}")
    assert files.actions(files.up()) == {"a": "restarted", "b": "restarted"}
    assert [files.spec(home, name)["port"] for name in "ab"] == [two, one]
    assert listens(one)
    assert listens(two)


def test_a_damaged_spec_is_written_anew(home: Path, path: Path) -> None:
    files.write(path, one="model: org/tiny")
    files.up()
    assert mdeploy("stop", "one").code == 0
    (home / "services/one/spec.json").write_text("{")
    (home / "services/one/revisions/0001.json").write_text("{")
    assert files.actions(files.up()) == {"one": "created"}


def test_a_file_that_changes_while_it_is_applied_is_applied_as_it_was_read(home: Path, path: Path) -> None:
    files.write(path, one="model: org/tiny", two="model: org/tiny, depends_on: one")
    with running("up") as process:
        until(lambda: (home / "services/one/spec.json").exists(), what="the first is being started")
        path.write_text("version: 1\nservices: [")
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert (ps("two") or {})["phase"] == "ready"
    assert mdeploy("up").code == 78


@pytest.mark.parametrize("verb", ["up", "down", "diff"])
def test_no_file_is_not_found(verb: str) -> None:
    result = mdeploy(verb)
    assert result.code == 3
    assert "-f FILE" in result.stderr


def test_the_names_must_be_of_the_file(path: Path) -> None:
    files.write(path, one="model: org/tiny")
    for verb in ("up", "down"):
        result = mdeploy(verb, "two")
        assert result.code == 3
        assert "it has one" in result.stderr


def test_what_is_missing_is_downloaded_once(path: Path, tmp_path: Path) -> None:
    copy_model(DEMO_MODEL, tmp_path / "hub" / "demo" / "mdeploy-faq")
    files.write(path, one="model: demo/mdeploy-faq", two="model: demo/mdeploy-faq")
    port = free_port()
    with running("mirror", tmp_path / "hub", "--port", str(port)) as hub:
        until(lambda: listens(port), what="the mirror listens")
        result = files.up(MODELSCOPE_ENDPOINT=f"http://127.0.0.1:{port}")
        hub.send_signal(signal.SIGINT)
        hub.communicate(timeout=20)
    assert result.stderr.count("downloading") == 1
    assert files.actions(files.up()) == {"one": "unchanged", "two": "unchanged"}
