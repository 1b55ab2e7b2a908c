"""What would keep a service from running is found before anything is changed: all of it, each with a way out."""

from __future__ import annotations

import pytest

from tests.systemd.box import ENGINE, HOME, MODEL, Box


def _refused(box: Box, file: str, *words: str) -> str:
    result = box.mdeploy("install-systemd", "--file", file, *words)
    assert result.code == 78, result.stdout + result.stderr
    assert "nothing was changed" in result.stderr
    assert box.run("ls", "/etc/systemd/system/mdeploy@.service").code != 0
    return result.stderr


def _copy(box: Box, where: str) -> str:
    box.ok("mkdir", "-p", where)
    box.ok("cp", "-r", MODEL, where)
    return f"{where}/tiny"


def test_everything_that_is_wrong_is_said_at_once(box: Box) -> None:
    closed = _copy(box, "/srv/closed")
    private = _copy(box, "/srv/private/models")
    box.ok("chmod", "600", f"{closed}/model.safetensors", f"{closed}/config.json")
    box.ok("chmod", "700", "/srv/private")
    file = box.file(a={"model": closed, "port": 80}, b={"model": private}, c={})
    said = _refused(box, file)
    assert "a: only root may listen on port 80" in said
    assert f"a: mdeploy may not read config.json, model.safetensors in {closed} (-rw------- root)" in said
    assert f"fix: chmod -R a+rX {closed}" in said
    assert "b: mdeploy may not enter /srv/private (drwx------ root)" in said
    assert f"cp -rL {private} /var/lib/mdeploy/models/" in said
    assert "c:" not in said
    box.ok("rm", "-r", "/srv/closed", "/srv/private")


def test_the_ways_out_that_are_named_work(box: Box) -> None:
    private = _copy(box, "/srv/private")
    box.ok("chmod", "700", "/srv/private")
    said = _refused(box, box.file(s={"model": private}))
    fix = said.split("fix: ")[1].splitlines()[0].split(", or")[0]
    assert fix == "chmod a+rX /srv/private"
    box.ok("sh", "-c", fix)
    assert box.install("s", model=private)["phase"] == "ready"
    box.ok("rm", "-r", "/srv/private")


def test_the_port_is_taken_by_another(box: Box) -> None:
    box.install("first", port=8040)
    box.ok("systemctl", "stop", "mdeploy@first")
    box.write("/run/systemd/system/squatter.service", "[Service]\nExecStart=python3 -m http.server 8040\n")
    box.ok("systemctl", "start", "squatter")
    result = box.mdeploy("install-systemd", "first")
    box.ok("systemctl", "stop", "squatter")
    assert result.code == 78
    assert "cannot listen on 127.0.0.1:8040" in result.stderr


def test_a_model_below_a_private_home_is_bound(box: Box) -> None:
    """Modes of the directories above do not matter in the sandbox; those of the files do."""
    model = _copy(box, "/root/.cache/models")
    box.ok("chmod", "700", "/root", "/root/.cache")
    assert box.install("s", model=model)["phase"] == "ready"
    assert f"BindReadOnlyPaths={model}\n" in box.ok("systemctl", "cat", "mdeploy@s")
    box.ok("chmod", "600", f"{model}/model.safetensors")
    result = box.mdeploy("install-systemd", "s")
    assert result.code == 78
    assert "mdeploy may not read model.safetensors" in result.stderr
    box.ok("rm", "-r", "/root/.cache/models")


def test_a_cache_made_of_links_and_a_home_in_a_home(box: Box) -> None:
    """A private home, an engine and an interpreter in it, a snapshot of links into a store beside it."""
    home, store = "/home/alice/state", "/home/alice/hub/blobs"
    model = "/home/alice/hub/snapshots/tiny"
    box.ok("mkdir", "-p", store, model)
    box.ok("cp", f"{MODEL}/model.safetensors", f"{store}/abc")
    box.ok("cp", f"{MODEL}/config.json", f"{MODEL}/tokenizer_config.json", model)
    box.ok("ln", "-s", "../../blobs/abc", f"{model}/model.safetensors")
    box.ok("ln", "-s", model, "/srv/by-another-name")
    box.ok("cp", "-r", ENGINE, "/home/alice/engine")
    box.ok("chmod", "700", "/home/alice")
    adopted = box.mdeploy("engines", "install", "vllm", "--python", "/home/alice/engine/bin/python", MDEPLOY_HOME=home)
    assert adopted.code == 0, adopted.stderr
    file = box.file(deep={"model": "/srv/by-another-name", "port": 8050})
    result = box.mdeploy("install-systemd", "--file", file, MDEPLOY_HOME=home)
    assert result.code == 0, result.stderr
    assert box.ask(8050) == 200
    unit = box.ok("systemctl", "cat", "mdeploy@deep")
    for path in (model, f"{store}/abc", "/home/alice/engine"):
        assert f"BindReadOnlyPaths={path}\n" in unit
    pid = box.shows("deep", "MainPID")
    assert box.ok("nsenter", "-t", pid, "--mount", "ls", "/home/alice").split() == ["engine", "hub", "state"]
    assert box.mdeploy("uninstall-systemd", "deep", MDEPLOY_HOME=home).code == 0
    box.ok("rm", "-r", home, "/home/alice/hub", "/home/alice/engine", "/srv/by-another-name")


@pytest.mark.parametrize("top", ["/srv", "/root"])
def test_names_no_shell_would_like(box: Box, top: str) -> None:
    """Home, model and engine in a directory whose name holds what systemd, shells and printf care for."""
    odd = f"""{top}/two words $HOME ${{X}} "q" it's a\\b %i 100% ü模型 #;"""
    model = _copy(box, odd)
    box.ok("cp", "-r", ENGINE, f"{odd}/engine")
    home = f"{odd}/home"
    adopted = box.mdeploy("engines", "install", "vllm", "--python", f"{odd}/engine/bin/python", MDEPLOY_HOME=home)
    assert adopted.code == 0, adopted.stderr
    file = box.file(odd={"model": model, "port": 8060})
    result = box.mdeploy("install-systemd", "--file", file, MDEPLOY_HOME=home, MDEPLOY_API_KEY="sk-odd")
    assert result.code == 0, result.stderr
    assert box.ask(8060, "sk-odd") == 200
    assert box.ask(8060) == 401
    gone = box.mdeploy("uninstall-systemd", "--all", MDEPLOY_HOME=home)
    assert (gone.code, gone.stdout) == (0, "odd\n"), gone.stderr
    box.ok("rm", "-r", odd)


def test_the_default_home_is_all_a_service_sees_of_itself(box: Box) -> None:
    box.write(f"{HOME}/config.yaml", "token: ms-private\n")
    box.ok("chmod", "644", f"{HOME}/config.yaml")
    box.install("s")
    assert box.ok("stat", "-c", "%a", f"{HOME}/config.yaml").strip() == "600"
    assert box.ok("stat", "-c", "%a", HOME).strip() == "755"
    box.ok("rm", f"{HOME}/config.yaml")
