"""The keys of a service: what a file must be, and that a bad one never opens the door."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdeploy.errors import ConfigError
from mdeploy.serving.auth import Keys


def test_without_a_file_nobody_is_asked() -> None:
    assert not Keys().required


@pytest.mark.parametrize("text", [None, "", " \n\n"])
def test_a_file_without_a_key_is_an_error(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Keys(file)
    assert "keys" in caught.value.message
    assert "mdeploy keys add" in caught.value.hint


def test_keys_from_before_stay_where_reading_them_again_fails(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo")
    keys = Keys(file)
    for text in ("", None):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ConfigError):
            keys.reload()
        assert keys.allows(b"Bearer two")
    file.write_text("three")
    keys.reload()
    assert [keys.allows(b"Bearer " + key) for key in (b"one", b"two", b"three")] == [False, False, True]


@pytest.mark.parametrize("given", [b"", b"Bearer", b"Bearer ", b"Basic b25l", b"one", b"Bearer\tone", b"Bearer on\xe9"])
def test_what_carries_no_key_is_not_let_in(tmp_path: Path, given: bytes) -> None:
    file = tmp_path / "keys"
    file.write_text("one")
    assert not Keys(file).allows(given)


def test_a_key_may_be_in_any_script(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("钥匙\n", encoding="utf-8")
    assert Keys(file).allows("Bearer 钥匙".encode())
