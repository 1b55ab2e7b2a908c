"""What a service reads, found by looking: links, virtual environments, sources installed in place."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from mdeploy.specs import Probe, ServiceSpec
from mdeploy.systemd import needs
from tests.support import tiny_model

SPEC = ServiceSpec("s", "llm", ("/bin/true",), {}, "/", "127.0.0.1", 8000, Probe("/", "/", {}), "m")


def _environment(root: Path, base: Path) -> Path:
    """A virtual environment as `venv` and uv make them: a link to the interpreter, and pyvenv.cfg."""
    (root / "bin").mkdir(parents=True)
    (root / "bin/python").symlink_to(base / "bin/python3.11")
    (root / "pyvenv.cfg").write_text(f"home = {base}/bin\nversion = 3.11.7\n")
    return root / "bin/python"


def test_an_interpreter_is_followed_through_every_link(tmp_path: Path) -> None:
    """uv: bin/python -> versioned directory -> (a link itself) the real one; all of these are opened on the way."""
    real = tmp_path / "uv/cpython-3.11.7"
    (real / "bin").mkdir(parents=True)
    (real / "bin/python3.11").write_text("")
    (tmp_path / "uv/cpython-3.11").symlink_to(real)
    python = _environment(tmp_path / "env", tmp_path / "uv/cpython-3.11")
    assert needs.environment(str(python)) == (f"{tmp_path}/env", f"{tmp_path}/uv/cpython-3.11")
    assert needs.binds(needs.environment(str(python)), (f"{tmp_path}/uv",)) == (f"{tmp_path}/uv/cpython-3.11",)


def test_a_source_installed_in_place_is_part_of_an_environment(tmp_path: Path) -> None:
    python = _environment(tmp_path / "env", Path("/usr"))
    note = tmp_path / "env/lib/python3.11/site-packages/vllm-0.32.0.dist-info/direct_url.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"url": "file:///srv/src%20of/vllm", "dir_info": {"editable": True}}))
    assert "/srv/src of/vllm" in needs.environment(str(python))
    note.write_text(json.dumps({"url": "https://example.org/x.whl", "archive_info": {}}))
    assert needs.environment(str(python)) == (str(tmp_path / "env"),)


def test_this_program_needs_its_interpreter_and_itself() -> None:
    program = needs.of_program()
    assert program.python == sys.executable
    assert sys.prefix in program.trees
    assert str(Path(needs.__file__).parent.parent) in program.trees


def test_paths_are_found_among_words_and_variables(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    cache, template = tmp_path / "cache", tmp_path / "template.jinja"
    cache.mkdir()
    template.write_text("")
    spec = dataclasses.replace(
        SPEC,
        argv=("/bin/true", "serve", str(model), f"--chat-template={template}", "/v1/x", "/health,/metrics", "/dev/shm"),
        env={"A_PATH": f"{cache}:/nonexistent", "B": "plain", "C": "/"},
        cwd=str(tmp_path / "own"),
        secrets={"KEY": str(template)},
    )
    found = needs.of_service(dataclasses.replace(spec, secrets={}))
    assert found == needs.Needs("/bin/true", (str(model), str(template)), (str(cache),))
    assert needs.of_service(spec).data == (str(model),)  # a key is handed over, not shown


def test_links_that_lead_into_a_hidden_tree_are_bound_where_they_enter_it(tmp_path: Path) -> None:
    hidden, model = tmp_path / "hidden", tmp_path / "open/model"
    for directory in (hidden / "blobs", hidden / "other", model):
        directory.mkdir(parents=True)
    (hidden / "blobs/a").write_text("")
    (hidden / "other/b").write_text("")
    (model / "a").symlink_to("../../hidden/blobs/a")
    (tmp_path / "open/way").symlink_to(hidden / "other")
    (model / "b").symlink_to("../way/b")
    (model / "inside").symlink_to("a")
    bound = needs.binds([str(model)], [str(hidden)])
    assert bound == (f"{hidden}/blobs/a", f"{hidden}/other/b")
    assert needs.binds([str(hidden / "blobs"), str(hidden / "blobs/a")], [str(hidden)]) == (f"{hidden}/blobs",)
    assert needs.binds([str(model)], ["/elsewhere"]) == ()


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert needs.entrance(str(tmp_path / "one/file"), ["/elsewhere"]) is None
    assert needs.environment(str(tmp_path / "one"))
