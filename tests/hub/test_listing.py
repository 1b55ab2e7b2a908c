from __future__ import annotations

import socket
from typing import Any

import pytest

from mdeploy.errors import ConfigError, MdeployError, NotFoundError, UnavailableError, UsageError
from mdeploy.hub import listing
from mdeploy.hub.listing import RepoFile
from mdeploy.specs import ModelRef
from tests.fakes import hub

REF = ModelRef(hub.MODEL)


def test_lists_every_file(hub_url: str) -> None:
    found = listing.fetch(REF, hub_url)
    assert {file.path: file.size for file in found.files} == {k: len(v) for k, v in hub.FILES.items()}
    assert len(found.commit) == 40
    assert not found.truncated


def test_the_commit_names_the_content(hub_url: str) -> None:
    found = listing.fetch(REF, hub_url)
    assert listing.fingerprint(reversed(found.files)) == found.commit
    assert listing.fingerprint(found.files[1:]) != found.commit
    assert listing.fetch(ModelRef(hub.MODEL, found.commit), hub_url) == found


@pytest.mark.parametrize(
    ("short", "expected"), [("abcdef12", "abcdef12" + "0" * 32), ("fffffff1", None), (None, None), ("a", None)]
)
def test_head_commit_is_found_among_the_files(short: str | None, expected: str | None) -> None:
    entries: list[Any] = [{"Revision": "1" * 40}, {"Revision": "abcdef12" + "0" * 32}, {"Path": "x"}]
    assert listing._head({"LatestCommitter": {"ShortId": short}}, entries) == expected


def test_unknown_model(hub_url: str) -> None:
    with pytest.raises(NotFoundError, match="no model demo/none"):
        listing.fetch(ModelRef("demo/none"), hub_url)


def test_unknown_revision_names_the_known_ones(hub_url: str) -> None:
    with pytest.raises(NotFoundError, match="no revision 'main'") as caught:
        listing.fetch(ModelRef(hub.MODEL, "main"), hub_url)
    assert "master" in caught.value.hint


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("status=401", ConfigError, "refuses access"),
        ("status=403", ConfigError, "refuses access"),
        ("status=400", MdeployError, "broken on purpose"),
        ("status=500", UnavailableError, "HTTP 500"),
        ("html", UnavailableError, "no ModelScope hub.*text/html"),
        ("null", NotFoundError, "empty at revision 'master'"),
        ("drop", UnavailableError, "cannot use the hub"),
        ("evil=../../x", MdeployError, "not inside the model"),
        ("evil=/etc/x", MdeployError, "not inside the model"),
        ("evil=a\\b", MdeployError, "not inside the model"),
    ],
)
def test_wrong_answers(
    hub_url: str, fault: str, kind: type[MdeployError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WAITS_S", (0.01,))
    with hub.front(hub_url, fault, on="/repo/files") as front, pytest.raises(kind, match=words):
        listing.fetch(REF, front.url)


def test_token_hint(hub_url: str) -> None:
    with hub.front(hub_url, "status=401") as front, pytest.raises(ConfigError) as caught:
        listing.fetch(REF, front.url)
    assert "MODELSCOPE_API_TOKEN" in caught.value.hint


def test_busy_hub_is_asked_again(hub_url: str) -> None:
    with hub.front(hub_url, "status=503", times=2) as front:
        assert listing.fetch(REF, front.url).files
        assert front.asked("/repo/files") == 3


def test_token_goes_to_the_hub(hub_url: str) -> None:
    with hub.front(hub_url, "html", times=0) as front:
        listing.fetch(REF, front.url, "secret")
        headers = front.log()[0]["headers"]
    assert headers == {"Authorization": "Bearer secret", "Cookie": "m_session_id=secret"}


def test_silence(hub_url: str) -> None:
    with hub.front(hub_url, "hang") as front, pytest.raises(UnavailableError, match="no answer in time"):
        listing.fetch(REF, front.url, timeout_s=0.2)


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(UnavailableError, match="refused"):
            listing.fetch(REF, f"http://user:pass@127.0.0.1:{port}")


def test_errors_do_not_show_passwords() -> None:
    assert listing.shown("http://user:pass@host:1/x") == "http://host:1/x"


def test_broken_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks9://x")
    with pytest.raises(ConfigError, match="proxy"):
        listing.fetch(REF, "http://hub.invalid")


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:pass@127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"refused \(through the proxy http://127.0.0.1:1\)"):
        listing.fetch(REF, "http://hub.invalid")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("modelscope.cn", "https://modelscope.cn"),
        (" http://h:1/ ", "http://h:1"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("HTTPS://h/base", "HTTPS://h/base"),
    ],
)
def test_endpoint(text: str, url: str) -> None:
    assert listing.check_endpoint(text) == url


@pytest.mark.parametrize("text", ["", "ftp://h", "http://", "http://h:x", "http://h:99999", "http://h h", "http://[1"])
def test_no_endpoint(text: str) -> None:
    with pytest.raises(UsageError):
        listing.check_endpoint(text)


@pytest.mark.parametrize("path", [None, "", "a//b", "./a", "a/", "a/../b", "a\nb", 7])
def test_unsafe_path(path: object) -> None:
    with pytest.raises(MdeployError, match="not inside"):
        listing.safe_path(path)


def test_fingerprint_is_stable() -> None:
    files = [RepoFile("a", 1, "0" * 64), RepoFile("b", 2, None)]
    assert listing.fingerprint(files) == listing.fingerprint(files[::-1])
