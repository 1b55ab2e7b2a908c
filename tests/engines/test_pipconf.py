"""uv must look where pip looks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mdeploy.engines import pipconf


def test_a_mirror_in_pips_own_file_reaches_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://user:pass@mirror.example/simple\ncert = /ca.pem\ntimeout = 7\n"
        "extra-index-url =\n    https://a.example/simple\n    https://b.example/simple\n"
        "[install]\nfind-links = /wheels /more\ntrusted-host = mirror.example\n"
    )
    for name in ("PIP_FIND_LINKS", "PIP_CERT", "PIP_DEFAULT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    pip = pipconf.read()
    assert pip["index-url"] == "https://user:pass@mirror.example/simple"
    uv = pipconf.uv_environment(pip)
    assert uv["UV_DEFAULT_INDEX"] == pip["index-url"]
    assert uv["UV_EXTRA_INDEX_URL"] == "https://a.example/simple https://b.example/simple"
    assert uv["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert uv["UV_FIND_LINKS"] == "/wheels,/more"
    assert uv["UV_INSECURE_HOST"] == "mirror.example"
    assert uv["SSL_CERT_FILE"] == "/ca.pem"


def test_the_environment_wins_over_install_over_global() -> None:
    listing = ":env:.index-url='e'\nglobal.index-url='g'\nglobal.cert='c'\ninstall.index-url='i'\ninstall.proxy='p'\n"
    assert pipconf.parse(listing) == {"index-url": "e", "cert": "c", "proxy": "p"}


def test_nothing_configured_changes_nothing_for_uv() -> None:
    assert pipconf.uv_environment({}) == {}


def test_read_agrees_with_pip_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    assert pipconf.read() == pipconf.parse(done.stdout)
