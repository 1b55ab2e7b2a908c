"""Keys: where one comes from, what may be one, and the file that keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdeploy import credentials, settings
from mdeploy.credentials import Key
from mdeploy.errors import ConfigError, MdeployError, UsageError
from mdeploy.settings import Settings


@pytest.fixture
def loaded() -> Settings:
    return settings.load()


def _find(loaded: Settings, declared: str | None, base: Path) -> Key | None:
    return credentials.find(loaded, "s", declared, base)


def test_what_was_declared_goes_before_the_setting_and_that_before_what_is_kept(
    loaded: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _find(loaded, None, tmp_path) is None
    credentials.keep(loaded.paths, "s", Key("x", "kept-key"))
    assert _find(loaded, None, tmp_path) == _find(loaded, "generate", tmp_path) == Key("kept", "kept-key", True)
    monkeypatch.setenv("MDEPLOY_API_KEY", "setting-key")
    assert _find(settings.load(), None, tmp_path) == Key("MDEPLOY_API_KEY", "setting-key")
    monkeypatch.setenv("OTHER", "declared-key")
    assert _find(settings.load(), "env:OTHER", tmp_path) == Key("env:OTHER", "declared-key")


def test_other_keys_of_a_file_stay_as_long_as_the_first_does(loaded: Settings) -> None:
    file = credentials.key_file(loaded.paths, "s")
    credentials.keep(loaded.paths, "s", Key("x", "one"))
    file.write_text("one\ntwo\n")
    credentials.keep(loaded.paths, "s", Key("x", "one"))
    assert file.read_text() == "one\ntwo\n"
    credentials.keep(loaded.paths, "s", Key("x", "three"))
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("three\n", 0o600)


def test_a_key_is_in_no_text_about_it() -> None:
    key = Key("generate", credentials.new_key())
    assert key.value not in repr(key)
    assert credentials.fingerprint(key.value) not in key.value
    assert credentials.check_key(key.value) == key.value


@pytest.mark.parametrize("text", ["", "two words", "schlüssel", "a\nb", "a\0b"])
def test_what_fits_no_header_is_no_key(text: str) -> None:
    with pytest.raises(UsageError) as error:
        credentials.check_key(text)
    assert not text or text not in error.value.message


@pytest.mark.parametrize(
    "declared", ["env:NOBODY_SET_THIS", "file:missing", "file:.", "file:public", "file:~nobodyknown/k"]
)
def test_keys_that_cannot_be_had(loaded: Settings, tmp_path: Path, declared: str) -> None:
    (tmp_path / "public").write_text("SECRET")
    (tmp_path / "public").chmod(0o644)
    with pytest.raises(MdeployError) as error:
        _find(loaded, declared, tmp_path)
    assert isinstance(error.value, ConfigError)
    assert "SECRET" not in error.value.message
