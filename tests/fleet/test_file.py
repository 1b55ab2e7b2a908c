"""mdeploy.yaml read: every mistake at once, with its line and a way out; what is right means what it says."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from mdeploy import settings
from mdeploy.errors import ConfigError, MdeployError, NotFoundError
from mdeploy.fleet import file
from mdeploy.fleet.file import Fleet
from mdeploy.prepare_llm import LlmRequest

GOOD = """\
version: 1
defaults:
  host: 127.0.0.1
  env: {A: 007, B: usual}
  lifecycle: {ready_timeout: 10m, drain: 90s}
services:
  rag:
    model: {id: a/b, revision: 1.0}
    depends_on: [chat, mail]
    env: {B: yes}
    lifecycle: {restart: always}
    gpus: {count: 2}
  chat:
    model: ./models/chat
    gpus: "0, 1"
    args: [--seed, 010]
    limits: {log_bytes: 64MiB, log_files: 2}
    max_model_len: 8192
  mail:
    recipe: mail.yaml
    port: 8010
    gpus: [3]
    depends_on: chat
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mdeploy.yaml"


def _load(path: Path, text: str) -> Fleet:
    path.write_text(textwrap.dedent(text))
    return file.load(settings.load(), Path(path.name))


def _refused(path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        _load(path, text)
    return error.value


def test_a_good_file_means_what_it_says(path: Path) -> None:
    fleet = _load(path, GOOD)
    assert fleet.names() == ("chat", "mail", "rag")
    chat, mail, rag = (file.request(service, fleet.path) for service in fleet.services)
    assert isinstance(chat, LlmRequest)
    assert isinstance(mail, LlmRequest)
    assert isinstance(rag, LlmRequest)
    assert (chat.wish.gpus, chat.wish.extra, chat.wish.max_model_len) == ((0, 1), ("--seed", "010"), "8192")
    assert (chat.wanted.model, chat.wanted.base) == ("./models/chat", path.parent)
    limits = chat.terms.limits
    assert (limits.log_bytes, limits.log_files, limits.stop_timeout_s) == (64 << 20, 2, 90)
    terms = mail.terms
    assert (mail.wanted.recipe, terms.port, terms.depends_on, terms.restart) == (
        "mail.yaml",
        8010,
        ("chat",),
        "on-failure",
    )
    assert (rag.wanted.model, rag.wanted.revision, rag.wish.gpu_count) == ("a/b", "1.0", 2)
    terms = rag.terms
    assert (terms.env, terms.restart, terms.limits.start_timeout_s) == ({"A": "007", "B": "yes"}, "always", 600)


def test_a_name_brings_what_it_needs_or_what_needs_it(path: Path) -> None:
    fleet = _load(path, GOOD)
    assert [s.name for s in fleet.with_dependencies(["mail"])] == ["chat", "mail"]
    assert [s.name for s in fleet.with_dependents(["mail"])] == ["rag", "mail"]
    assert [s.name for s in fleet.with_dependents([])] == ["rag", "mail", "chat"]
    with pytest.raises(NotFoundError, match="no service mall") as error:
        fleet.with_dependencies(["mall"])
    assert "chat, mail, rag" in error.value.hint


def test_every_mistake_is_told_at_once_with_its_line(path: Path) -> None:
    error = _refused(
        path,
        """\
        version: 1
        defaults:
          lifecycle: {drian: 3}
        services:
          chat:
            model: a/b
            prot: 8000
            port: "80"
            gpus: 2
            port: 90
          speech:
            kind: asr
            model: a/b
            lifecycle: {ready_timeout: soon}
            depends_on: chatt
          b: 5
        """,
    )
    assert error.message.splitlines() == [
        "mdeploy.yaml:3: defaults.lifecycle.drian: unknown key, did you mean drain?",
        "mdeploy.yaml:7: services.chat.prot: unknown key, did you mean port?",
        "mdeploy.yaml:9: services.chat.gpus: must be \"0,1\", [0, 1], {ids: [0, 1]}, {count: 2}, all or none, not '2'",
        "mdeploy.yaml:10: services.chat.port: given twice, in line 8 too",
        "mdeploy.yaml:12: services.speech.kind: kind asr is not served by this version, llm, app, embed, gme are",
        "mdeploy.yaml:14: services.speech.lifecycle.ready_timeout: must be "
        "seconds, or a duration like 90s or 10m, not 'soon'",
        "mdeploy.yaml:15: services.speech.depends_on: there is no service 'chatt' in this file, did you mean chat?",
        "mdeploy.yaml:16: services.b: must be a mapping, not '5'",
    ]
    assert error.exit_code == 78


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{}", ":3: services.x.model: is missing"),
        ("{model: ''}", "services.x.model: is missing"),
        ("{model: a/b, port: '80'}", "port: must be a whole number, not '80'"),
        ("{model: a/b, port: 8000.5}", "port: must be a whole number"),
        ("{model: a/b, port: true}", "port: must be a whole number"),
        ("{model: a/b, port: 0}", "port: must be between 1 and 65535"),
        ("{model: a/b, port: 99999999999999999999999999}", "port: far too large a number"),
        ("{model: a/b, gpu_memory_utilization: .inf}", "must be a finite number"),
        ("{model: a/b, gpu_memory_utilization: 1.5}", "more than 0 and at most 1"),
        ("{model: a/b, args: --seed 1}", "args: must be a list"),
        ("{model: a/b, args: [--seed, null]}", "args[1]: must be text, not nothing"),
        ("{model: a/b, host: ''}", "host: is empty"),
        ("{model: a/b, insecure: 'yes'}", "insecure: must be true or false"),
        ("{model: a/b, gpus: {}}", "either ids or count"),
        ("{model: a/b, gpus: {ids: [0], count: 1}}", "either ids or count"),
        ("{model: a/b, gpus: {count: 0}}", "at least 1"),
        ("{model: a/b, gpus: {count: 1, shared: true}}", "named by ids"),
        ("{model: a/b, gpus: [0, 0]}", "each once"),
        ("{model: a/b, gpus: [-1]}", "from 0"),
        ("{model: a/b, gpus: '0,1', tp: 3}", "tp: is 3, but gpus has 2"),
        ("{model: a/b, env: {MY_TOKEN: SECRET}}", "MY_TOKEN: sounds like a secret"),
        ("{model: a/b, env: {'a b': x}}", "no name of a variable"),
        ("{model: a/b, env: {CUDA_VISIBLE_DEVICES: '1'}}", "gpus: {ids"),
        ("{model: a/b, env: {A: [SECRET]}}", "env.A: must be text, not a list"),
        ("{model: a/b, auth: {key: SECRET}}", "must be generate, file:PATH or env:VARIABLE"),
        ("{model: a/b, auth: {key: {a: SECRET}}}", "auth.key: must be text"),
        ("{model: a/b, batch: 8}", "--max-num-seqs"),
        ("{model: a/b, workers_per_gpu: 2}", "declare more services"),
        ("{model: a/b, limits: {log_bytes: 1}}", "between 65536"),
        ("{model: a/b, limits: {log_bytes: 5 parsecs}}", "a size like 64MiB"),
        ("{model: a/b, lifecycle: {restart: no}}", "always, on-failure or never"),
        ("{model: a/b, lifecycle: {drain: -5}}", "between 0 and"),
        ("{model: a/b, lifecycle: {drain: 1.0e+300}}", "between 0 and"),
        ("{model: a/b, depends_on: x}", "goes in a circle: x → x"),
        ('{model: "a/\\0b"}', "NUL"),
        ('{model: "a/\\ud800b"}', "half a character"),
        ("{model: !!python/object/apply:os.system [ls]}", "os.system"),
        ("{model: a/b, ? [a] : 1}", "a key must be one word"),
        ("{model: {id: a/b, revison: x}}", "did you mean revision?"),
        ("[a]", "services.x: must be a mapping, not a list"),
    ],
)
def test_wrong_values(path: Path, entry: str, says: str) -> None:
    error = _refused(path, f"version: 1\nservices:\n  x: {entry}\n")
    assert says in error.message
    assert "SECRET" not in error.message + error.hint
    assert error.message.startswith("mdeploy.yaml:3:")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "mdeploy.yaml is empty"),
        ("# nothing\n", "mdeploy.yaml is empty"),
        ("a", "must be a mapping"),
        ("[1]", "must be a mapping"),
        ("version: 1\n", "services: is missing"),
        ("version: 1\nservices: {}\n", "names no service"),
        ("version: 1\nservices:\n", "services: must be a mapping of names to services, not nothing"),
        ("version: 1\nservices: 5\n", "services: must be a mapping of names to services, not '5'"),
        ("version: 1\nservices: [a]\n", "services: must be a mapping of names to services, not a list"),
        ("version: 1\nservices: {x: {model: a/b}}\ndefaults: 5\n", "defaults: must be a mapping, not '5'"),
        ("services: {x: {model: a/b}}\n", "version: is missing: write `version: 1`"),
        ("version: 2\nservices: {x: {model: a/b}}\n", "reads version 1, not 2"),
        ("version: 1\nservices:\n\tx: 1\n", "mdeploy.yaml:3: no valid YAML"),
        ("version: 1\nservices: {x: *nobody}\n", "mdeploy.yaml:2: no valid YAML"),
        ("version: 1\nservices: {x: [}\n", "mdeploy.yaml:2: no valid YAML"),
        ("version: 1\n---\nversion: 1\n", "no valid YAML"),
        ("version: 1\nservices: {x: &a [*a]}\n", "it contains itself"),
        ("version: 1\nservices: {'ä': {model: a/b}}\n", "'ä' is no service name"),
        ("version: 1\nservices: {../x: {model: a/b}}\n", "'../x' is no service name"),
        ("version: 1\nservices: " + "[" * 3000, "nested too deeply"),
        ("version: 1\nx: \x01\n", "no valid YAML"),
        ("version: 1\nservices:\n  a: {model: a/b}\n  a: {model: a/b}\n", ":4: services.a: given twice, in line 3 too"),
        ("version: 1\nservices:\n  a: {model: m/m, depends_on: b}\n  b: {model: m/m, depends_on: [a]}\n", "→"),
    ],
)
def test_wrong_files(path: Path, text: str, says: str) -> None:
    assert says in _refused(path, text).message


def test_aliases_that_explode_end_in_words(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "far too many values" in _refused(path, "\n".join(lines)).message


def test_what_is_no_text(path: Path) -> None:
    path.write_bytes("version: 1\n# ä\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        file.load(settings.load(), path)
    path.write_bytes(b"version: 1\n" + b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        file.load(settings.load(), path)
    with pytest.raises(ConfigError, match="cannot read"):
        file.load(settings.load(), path.parent)
    with pytest.raises(NotFoundError, match="no file"):
        file.load(settings.load(), path.parent / "none.yaml")


def test_a_byte_order_mark_and_windows_lines_are_fine(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert file.load(settings.load(), path).names() == ("chat", "mail", "rag")


def test_anchors_merges_and_extensions(path: Path) -> None:
    fleet = _load(
        path,
        """\
        version: 1
        x-usual: &usual {model: a/b, args: [--seed, '1'], env: {A: x}}
        services:
          one: *usual
          two: {<<: *usual, args: []}
          three: &three {<<: *usual, tp: 2}
          four: *three
        """,
    )
    asked = ((s.name, file.request(s, fleet.path)) for s in fleet.services)
    requests = {name: request for name, request in asked if isinstance(request, LlmRequest)}
    assert {name: r.wish.extra for name, r in requests.items()} == {
        "one": ("--seed", "1"),
        "two": (),
        "three": ("--seed", "1"),
        "four": ("--seed", "1"),
    }
    assert (requests["three"].wish.tp, requests["four"].wish.tp, requests["four"].terms.env) == (2, 2, {"A": "x"})


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("port: 8001", "port: 8001", "8001 is the port of a already"),
        ("port: 8001, host: 0.0.0.0, insecure: true", "port: 8001, host: 127.0.0.1", "port of a already"),
        ("port: 8001, host: localhost", "port: 8001, host: 127.0.0.1", "port of a already"),
        ("gpus: '0,1'", "gpus: {ids: [1]}", "GPU 1 is a's already"),
        ("gpus: {ids: [1], shared: true}", "gpus: {ids: [1]}", "shared: true} in both"),
    ],
)
def test_what_two_services_cannot_both_have(path: Path, one: str, other: str, says: str) -> None:
    text = f"version: 1\nservices:\n  a: {{model: m/m, {one}}}\n  b: {{model: m/m, {other}}}\n"
    error = _refused(path, text)
    assert says in error.message
    assert error.message.startswith("mdeploy.yaml:4: services.b.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("port: 8001, host: 127.0.0.1", "port: 8001, host: 127.0.0.2"),
        ("gpus: {ids: [1], shared: true}", "gpus: {ids: [1], shared: true}"),
    ],
)
def test_what_they_can(path: Path, one: str, other: str) -> None:
    text = f"version: 1\nservices:\n  a: {{model: m/m, {one}}}\n  b: {{model: m/m, {other}}}\n"
    assert _load(path, text).names() == ("a", "b")


def test_what_came_from_the_defaults_is_told_there(path: Path) -> None:
    error = _refused(path, "version: 1\ndefaults:\n  port: 70000\nservices:\n  a: {model: m/m}\n")
    assert error.message == "mdeploy.yaml:3: defaults.port: must be between 1 and 65535, not 70000"


@pytest.mark.parametrize("damage", ["version", "services", "chat", "model", "gpus", "lifecycle", "depends_on", "env"])
def test_no_torn_file_ends_in_a_traceback(path: Path, damage: str) -> None:
    """Every prefix that ends at a key, as an editor that crashed would leave it."""
    for at in range(len(GOOD)):
        if GOOD.startswith(damage, at):
            for text in (GOOD[:at], GOOD[: at + 2], GOOD[:at] + "\x00", GOOD[:at] + ": : {"):
                path.write_text(text)
                try:
                    assert file.load(settings.load(), path).services
                except MdeployError as error:
                    assert str(path) in error.message
