"""flag > environment > .env > config.yaml > default, and every value knows where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdeploy import settings
from mdeploy.errors import ConfigError


def test_layers_in_order(tmp_path: Path) -> None:
    home = tmp_path / "h"
    home.mkdir()
    (home / "config.yaml").write_text("host: 10.0.0.1\nendpoint: http://file\nengine: file\nport: 9000\n")
    (tmp_path / ".env").write_text("MODELSCOPE_ENDPOINT=http://dotenv\nMDEPLOY_ENGINE=dotenv\n")
    env = {"MDEPLOY_HOME": str(home), "MDEPLOY_ENGINE": "env", "HOME": str(tmp_path)}
    loaded = settings.load(flags={"host": None, "engine": "flag"}, env=env, cwd=tmp_path)
    origins = {name: (s.value, s.origin) for name, s in loaded.values.items()}
    assert origins["engine"] == ("flag", "flag")
    assert origins["home"] == (str(home), "environment MDEPLOY_HOME")
    assert origins["endpoint"] == ("http://dotenv", ".env")
    assert origins["host"] == ("10.0.0.1", "config.yaml")
    assert origins["port"] == ("9000", "config.yaml")
    assert origins["cache_dir"] == (str(tmp_path / ".cache/modelscope"), "default")
    assert origins["token"] == (None, "unset")


def test_home_may_come_from_dotenv(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MDEPLOY_HOME={tmp_path / 'here'}\n")
    assert settings.load(env={}, cwd=tmp_path).paths.home == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "names"), [("hots: x\n", "hots"), ("- a\n", "mapping"), ("a: [\n", "config.yaml"), ("home: /x\n", "home")]
)
def test_a_bad_config_file_is_named(tmp_path: Path, text: str, names: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=names):
        settings.load(env={"MDEPLOY_HOME": str(tmp_path)}, cwd=tmp_path / "..")
