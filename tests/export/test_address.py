"""Addresses: every form there is, and the ones that only look like it."""

from __future__ import annotations

import pytest

from mdeploy.errors import UsageError
from mdeploy.export import address


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("10.0.0.5:8000", "10.0.0.5:8000"),
        ("Node-7.Example.org:80", "node-7.example.org:80"),
        ("[FD00:0::6]:8000", "[fd00::6]:8000"),
        ("unix:/run/app.sock", "unix:/run/app.sock"),
        ("docker_host:1", "docker_host:1"),
    ],
)
def test_servers(text: str, written: str) -> None:
    assert str(address.server(text)) == written


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.5",
        "10.0.0.5:0",
        "10.0.0.5:65536",
        "10.0.0.5:٣",
        "300.1.1.1:80",
        "::1:8000",
        "fd00::6",
        "[fe80::1%eth0]:80",
        "[10.0.0.5]:80",
        "http://10.0.0.5:80",
        "10.0.0.5:80/path",
        "a b:80",
        "a;b:80",
        "-a:80",
        ":80",
        "*:80",
        "0.0.0.0:80",
        "[::]:80",
        "unix:relative",
        "unix:/a b",
        "unix:",
    ],
)
def test_no_servers(text: str) -> None:
    with pytest.raises(UsageError):
        address.server(text)


@pytest.mark.parametrize(
    ("text", "is_any", "is_private"),
    [
        ("80", True, False),
        ("0.0.0.0:80", True, False),
        ("[::]:80", True, False),
        ("127.0.0.1:80", False, True),
        ("[::1]:80", False, True),
        ("localhost:80", False, True),
        ("unix:/run/a.sock", False, True),
        ("10.0.0.5:80", False, False),
    ],
)
def test_who_can_reach_it(text: str, is_any: bool, is_private: bool) -> None:
    found = address.listen(text)
    assert (found.is_any, found.is_private) == (is_any, is_private)


@pytest.mark.parametrize("text", ["0", "65536", "http", "-1", "²"])
def test_no_ports(text: str) -> None:
    with pytest.raises(UsageError):
        address.listen(text)
