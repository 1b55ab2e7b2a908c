"""Keys that a file declares: made, read from elsewhere, kept; never shown, never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet import files
from tests.support import mdeploy, tiny_model

pytestmark = pytest.mark.usefixtures("fake_engine")

SECRET = "sk-do-not-show-me"


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "org" / "tiny")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mdeploy.yaml"


def _kept(home: Path, name: str) -> str:
    file = home / "secrets" / f"{name}.api-key"
    assert file.stat().st_mode & 0o777 == 0o600
    return file.read_text().strip()


def _answer(home: Path, name: str, key: str) -> int:
    import httpx

    url = f"http://127.0.0.1:{files.spec(home, name)['port']}/v1/completions"
    return httpx.post(url, json={}, headers={"Authorization": f"Bearer {key}"}, trust_env=False).status_code


def test_a_key_is_made_once_and_kept(home: Path, path: Path) -> None:
    files.write(path, chat="model: org/tiny, auth: {key: generate}")
    assert "auth.key" not in mdeploy("diff").stdout
    files.up()
    key = _kept(home, "chat")
    assert key.startswith("sk-")
    assert (_answer(home, "chat", key), _answer(home, "chat", "other")) == (200, 401)
    assert files.actions(files.up()) == {"chat": "unchanged"}
    assert _kept(home, "chat") == key


def test_a_key_from_a_file_or_a_variable_is_followed(home: Path, path: Path) -> None:
    source = path.with_name("key")
    source.write_text(f"{SECRET}-1\n")
    source.chmod(0o600)
    files.write(path, one="model: org/tiny, auth: {key: file:key}", two="model: org/tiny, auth: {key: env:CHAT}")
    first = files.up(CHAT=f"{SECRET}-2")
    assert (_kept(home, "one"), _kept(home, "two")) == (f"{SECRET}-1", f"{SECRET}-2")
    source.write_text(f"{SECRET}-3\n")
    changed = mdeploy("diff", CHAT=f"{SECRET}-2")
    assert "one: changed" in changed.stdout
    assert "auth.key: " in changed.stdout
    second = files.up(CHAT=f"{SECRET}-2")
    assert files.actions(second) == {"one": "restarted", "two": "unchanged"}
    assert _answer(home, "one", f"{SECRET}-3") == 200
    told = [first.stdout, first.stderr, changed.stdout, second.stdout, second.stderr]
    assert not any(SECRET in text for text in told)
    holders = [p for p in home.rglob("*") if p.is_file() and SECRET in p.read_text(errors="replace")]
    assert {p.parent.name for p in holders} == {"secrets"}


def test_a_key_that_others_may_read_is_no_key(path: Path) -> None:
    path.with_name("key").write_text(SECRET)
    path.with_name("key").chmod(0o644)
    files.write(path, one="model: org/tiny, auth: {key: file:key}")
    result = mdeploy("up")
    assert result.code == 78
    assert "everybody may read" in result.stderr
    assert "chmod 600" in result.stderr


@pytest.mark.parametrize(("text", "says"), [("", "printable"), ("two words", "printable"), (None, "No such file")])
def test_a_key_that_cannot_be_one(path: Path, text: str | None, says: str) -> None:
    if text is not None:
        path.with_name("key").write_text(text)
        path.with_name("key").chmod(0o600)
    files.write(path, one="model: org/tiny, auth: {key: file:key}")
    result = mdeploy("up")
    assert result.code == 78
    assert says in result.stderr
    assert "two words" not in result.stderr


def test_what_mdeploy_keys_did_is_no_difference(home: Path, path: Path) -> None:
    files.write(path, chat="model: org/tiny")
    files.up()
    assert mdeploy("keys", "add", "chat").code == 0
    assert mdeploy("diff").code == 0
    assert mdeploy("keys", "rotate", "chat").code == 0
    key = _kept(home, "chat")
    assert files.actions(files.up()) == {"chat": "unchanged"}
    files.write(path, chat="model: org/tiny, args: [--max-num-seqs, 3]")
    files.up()
    assert (_kept(home, "chat"), _answer(home, "chat", "other")) == (key, 401)


def test_a_rollback_never_opens_a_service(home: Path, path: Path) -> None:
    files.write(path, chat="model: org/tiny")
    files.up()
    files.write(path, chat="model: org/tiny, auth: {key: generate}")
    files.up()
    key = _kept(home, "chat")
    assert mdeploy("rollback", "chat", "--to", "1").code == 0
    assert (_answer(home, "chat", key), _answer(home, "chat", "other")) == (200, 401)


def test_serve_keeps_the_key_a_service_has(home: Path, model: Path) -> None:
    served = ("serve", "llm", model, "--name", "chat", "-d")
    assert mdeploy(*served, MDEPLOY_API_KEY=SECRET).code == 0
    assert mdeploy("stop", "chat").code == 0
    again = mdeploy(*served)
    assert again.code == 0
    assert "asks for the key it has" in again.stderr
    assert "mdeploy keys rm chat" in again.stderr
    assert (_kept(home, "chat"), _answer(home, "chat", "other")) == (SECRET, 401)
    assert mdeploy("stop", "chat").code == 0
    (home / "secrets/chat.api-key").write_text("\n")
    empty = mdeploy(*served)
    assert empty.code == 78
    assert "is empty" in empty.stderr
