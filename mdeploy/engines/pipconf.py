"""Where this machine's pip gets packages from, said again in uv's words.

uv reads none of pip's configuration, yet that is where people behind a mirror, a proxy or a
company CA have written it down. Everything travels in the environment: an index URL may hold
a password, and a command line is public.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping


def read(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """pip's merged settings as `{"index-url": …}`, whichever pip of this machine answers first."""
    env = os.environ if env is None else env
    for command in _pips():
        done = subprocess.run([*command, "config", "list"], env=dict(env), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return parse(done.stdout)
    return {_key(name.removeprefix("PIP_")): value for name, value in env.items() if name.startswith("PIP_")}


def _pips() -> list[list[str]]:
    found = [path for name in ("pip3", "pip") if (path := shutil.which(name))]
    return [[sys.executable, "-m", "pip"], *([path] for path in found)]


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


def parse(listing: str) -> dict[str, str]:
    """Read `pip config list`: environment over [install] over [global], as pip itself ranks them.

    Multi-line values (several indexes) come back separated by single spaces.
    """
    ranked: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, literal = line.partition("=")
        section, _, key = name.partition(".")
        if section in ranked and literal:
            ranked[section][_key(key)] = " ".join(str(ast.literal_eval(literal)).split())
    return {**ranked["global"], **ranked["install"], **ranked[":env:"]}


def uv_environment(pip: Mapping[str, str]) -> dict[str, str]:
    """The UV_* variables that make uv look where `pip` looks; settings without a twin are left out.

    pip takes the best version of all its indexes, uv the first index that knows the name:
    `unsafe-best-match` is uv's name for what pip does, and only set where there are several.
    """
    uv = {
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_EXTRA_INDEX_URL": pip.get("extra-index-url", ""),
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_INSECURE_HOST": pip.get("trusted-host", ""),
        "UV_HTTP_TIMEOUT": pip.get("timeout", pip.get("default-timeout", "")),
        "SSL_CERT_FILE": pip.get("cert", ""),
        "SSL_CLIENT_CERT": pip.get("client-cert", ""),
        "HTTPS_PROXY": pip.get("proxy", ""),
        "UV_NO_INDEX": "1" if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else "",
        "UV_INDEX_STRATEGY": "unsafe-best-match" if pip.get("extra-index-url") else "",
    }
    return {name: value for name, value in uv.items() if value}
