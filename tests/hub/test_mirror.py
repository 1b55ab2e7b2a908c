from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.hub import mirror, store
from mdeploy.hub.catalog import Catalog
from mdeploy.specs import ModelRef
from tests.fakes import hub

Answer = tuple[int, dict[str, str], bytes]


def ask(url: str, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    reply = connection.getresponse()
    answer = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return answer


def file(url: str, path: str, revision: str = "master", model: str = hub.MODEL, **headers: str) -> Answer:
    return ask(url, f"/api/v1/models/{model}/repo?" + urlencode({"Revision": revision, "FilePath": path}), **headers)


def listed(url: str, model: str = hub.MODEL, **query: str) -> Any:
    text = urlencode({"Revision": "master", "Recursive": "True", **query})
    return json.loads(ask(url, f"/api/v1/models/{model}/repo/files?{text}")[2])


def blobs(document: Any) -> set[str]:
    return {entry["Path"] for entry in document["Data"]["Files"] if entry["Type"] == "blob"}


def test_listing_has_the_shape_of_the_hub(hub_url: str) -> None:
    document = listed(hub_url)
    assert (document["Code"], document["Success"]) == (200, True)
    entries = {entry["Path"]: entry for entry in document["Data"]["Files"]}
    assert entries["sub/deeper"]["Type"] == "tree"
    big = entries[hub.BIG]
    assert (big["Type"], big["Size"], len(big["Sha256"])) == ("blob", hub.BIG_BYTES, 64)
    assert big["Revision"].startswith(document["Data"]["LatestCommitter"]["ShortId"])
    assert blobs(document) == set(hub.FILES)


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ({"Root": "sub"}, {"sub/deeper", "sub/deeper/vocab.txt"}),
        ({"Root": "sub", "Recursive": "False"}, {"sub/deeper"}),
        ({"Root": "none"}, set()),
    ],
)
def test_listing_below_a_directory(hub_url: str, query: dict[str, str], paths: set[str]) -> None:
    assert {entry["Path"] for entry in listed(hub_url, **query)["Data"]["Files"]} == paths


def test_unknown_revision_is_null_as_on_the_real_hub(hub_url: str) -> None:
    document = listed(hub_url, Revision="main")
    assert (document["Code"], document["Data"]["Files"]) == (200, None)


@pytest.mark.parametrize("action", ["", "/repo/files", "/revisions", "/repo?FilePath=config.json"])
def test_unknown_model(hub_url: str, action: str) -> None:
    status, _, body = ask(hub_url, f"/api/v1/models/demo/none{action}")
    document = json.loads(body)
    assert (status, document["Success"]) == (404, False)
    assert document["Code"] == 10010205001


def test_revisions_and_info(hub_url: str) -> None:
    branches = json.loads(ask(hub_url, f"/api/v1/models/{hub.MODEL}/revisions")[2])["Data"]["RevisionMap"]["Branches"]
    assert [branch["Revision"] for branch in branches] == ["master"]
    assert json.loads(ask(hub_url, f"/api/v1/models/{hub.MODEL}")[2])["Data"]["Name"] == "tiny-1.5"


@pytest.mark.parametrize("path", ["/", "/api/v1/repos/internalAccelerationInfo", "/api/v1/models/a", "//x"])
def test_other_addresses(hub_url: str, path: str) -> None:
    status, headers, body = ask(hub_url, path)
    assert status in (400, 404)
    assert headers["Content-Type"].startswith("application/json")
    assert not json.loads(body)["Success"]


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET http://[x HTTP/1.1\r\n\r\n",
        b"GET /api/v1/models/a/b?x=\xff HTTP/1.1\r\n\r\n",
        b"POST /api/v1/models/a/b HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nContent-Length: 30\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
def test_nonsense_gets_one_answer_and_the_door(hub_url: str, request_text: bytes) -> None:
    address = urlsplit(hub_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(request_text)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize("name", sorted(hub.FILES))
def test_files(hub_url: str, name: str) -> None:
    status, headers, body = file(hub_url, name)
    assert (status, body, headers["Content-Length"]) == (200, hub.FILES[name], str(len(body)))
    status, again, body = file(hub_url, name, method="HEAD")
    assert (status, body) == (200, b"")
    assert again["ETag"] == headers["ETag"]
    assert again["Content-Length"] == headers["Content-Length"]


BIG = hub.FILES[hub.BIG]
LAST = hub.BIG_BYTES - 1


@pytest.mark.parametrize(
    ("asked", "status", "told", "body"),
    [
        ("bytes=0-9", 206, f"bytes 0-9/{hub.BIG_BYTES}", BIG[:10]),
        ("bytes=10-", 206, f"bytes 10-{LAST}/{hub.BIG_BYTES}", BIG[10:]),
        ("bytes=-5", 206, f"bytes {LAST - 4}-{LAST}/{hub.BIG_BYTES}", BIG[-5:]),
        ("bytes=2999990-9999999", 206, f"bytes 2999990-{LAST}/{hub.BIG_BYTES}", BIG[2999990:]),
        ("bytes=-9999999", 200, None, BIG),
        ("bytes=0-", 200, None, BIG),
        (f"bytes={hub.BIG_BYTES}-", 416, f"bytes */{hub.BIG_BYTES}", b""),
        ("bytes=-0", 416, f"bytes */{hub.BIG_BYTES}", b""),
        ("bytes=9-3", 200, None, BIG),
        ("bytes=0-1,5-6", 200, None, BIG),
        ("bytes=x", 200, None, BIG),
        ("bytes=-", 200, None, BIG),
        ("bytes=" + "9" * 5000 + "-", 200, None, BIG),
    ],
)
def test_ranges(hub_url: str, asked: str, status: int, told: str | None, body: bytes) -> None:
    found, headers, content = file(hub_url, hub.BIG, Range=asked)
    assert (found, headers.get("Content-Range")) == (status, told)
    assert content == body


def test_if_range(hub_url: str) -> None:
    etag = file(hub_url, hub.BIG)[1]["ETag"]
    assert file(hub_url, hub.BIG, Range="bytes=0-1", If_Range=etag)[0] == 206
    assert file(hub_url, hub.BIG, Range="bytes=0-1", If_Range='"old"')[0] == 200


def test_range_of_an_empty_file(hub_url: str) -> None:
    assert file(hub_url, "empty.txt", Range="bytes=0-")[0] == 416


def test_connection_is_kept(hub_url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub_url).netloc, timeout=30)
    sockets = set()
    for name in ("config.json", "none", hub.BIG):
        connection.request("GET", f"/api/v1/models/{hub.MODEL}/repo?FilePath={quote(name)}")
        connection.getresponse().read()
        sockets.add(connection.sock)
    connection.close()
    assert len(sockets) == 1


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory with a model and much that is nobody's business."""
    root = tmp_path / "shared"
    directory = hub.make_model(root)
    (tmp_path / "secret").write_text("secret")
    (root / "secret").write_text("secret")
    for name in (".git/config", ".env", ".lock/x", "w.bin.lock/.x", ".msc"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("hidden")
    (directory / "out").symlink_to(tmp_path / "secret")
    (directory / "outdir").symlink_to(tmp_path)
    (directory / "loop").symlink_to(directory)
    (directory / "in.bin").symlink_to(directory / hub.BIG)
    hub.make_model(root, "photos/holiday", {"a.jpg": b"x"})
    (root / "demo" / "away").symlink_to(tmp_path)
    return root


def test_only_the_model_is_visible(shared: Path) -> None:
    with hub.mirror(shared) as url:
        assert blobs(listed(url)) == {*hub.FILES, "in.bin"}
        assert file(url, "in.bin")[2] == BIG


@pytest.mark.parametrize(
    "path",
    [
        "../../secret",
        "../../../secret",
        "sub/../../../secret",
        "/etc/passwd",
        "out",
        "outdir/secret",
        ".git/config",
        ".env",
        ".msc",
        "loop/config.json",
        "sub",
        "",
        "x\0y",
        "..",
        "./config.json",
    ],
)
def test_everything_else_is_refused(shared: Path, path: str) -> None:
    with hub.mirror(shared) as url:
        assert file(url, path)[0] == 404


@pytest.mark.parametrize(
    "model", ["../shared", "..%2f..", "demo/away", "demo/..", "photos/holiday", "%2e%2e/shared/demo"]
)
def test_other_directories_are_no_models(shared: Path, model: str) -> None:
    with hub.mirror(shared) as url:
        assert ask(url, f"/api/v1/models/{model}/repo/files?Revision=master")[0] == 404


def test_cache_layouts_and_revisions(tmp_path: Path) -> None:
    for path in ("models/a--b.1/snapshots/master", "models/a--b.1/snapshots/v1", "hub/models/c/d___5", "models/e/f"):
        hub.make_model(tmp_path, path, {"config.json": path.encode()})
    with hub.mirror(tmp_path) as url:
        assert file(url, "config.json", model="a/b.1")[2] == b"models/a--b.1/snapshots/master"
        assert file(url, "config.json", "v1", "a/b.1")[2] == b"models/a--b.1/snapshots/v1"
        assert file(url, "config.json", model="c/d.5")[2] == b"hub/models/c/d___5"
        assert file(url, "config.json", model="e/f")[2] == b"models/e/f"
    assert Catalog(tmp_path).ids() == ("a/b.1", "c/d.5", "e/f")


def test_a_model_on_its_way_is_not_served(tmp_path: Path) -> None:
    hub.make_model(tmp_path)
    arriving = hub.make_model(tmp_path, "demo/arriving", {"config.json": b"{}", "w.bin.incomplete": b"1"})
    with hub.mirror(tmp_path) as url:
        assert ask(url, "/api/v1/models/demo/arriving/revisions")[0] == 404
        (arriving / "w.bin.incomplete").rename(arriving / "w.bin")
        assert blobs(listed(url, "demo/arriving")) == {"config.json", "w.bin"}


def test_changed_content_changes_the_commit(tmp_path: Path) -> None:
    directory = hub.make_model(tmp_path)
    first = Catalog(tmp_path).snapshot(hub.MODEL, "master")
    (directory / "config.json").write_text("{}")
    second = Catalog(tmp_path).snapshot(hub.MODEL, "master")
    assert first and second and first.commit != second.commit


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdeploy.hub.catalog._FRESH_S", -1.0)
    directory = hub.make_model(tmp_path)
    catalog = Catalog(tmp_path)
    first = catalog.snapshot(hub.MODEL, "master")
    stat = (directory / "config.json").stat()
    (directory / "config.json").write_bytes(hub.FILES["config.json"][::-1])
    os.utime(directory / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert catalog.snapshot(hub.MODEL, "master") == first
    os.utime(directory / "config.json", ns=(0, 0))
    assert catalog.snapshot(hub.MODEL, "master") != first


def test_a_vanished_file_ends_in_an_answer(tmp_path: Path) -> None:
    directory = hub.make_model(tmp_path)
    with hub.mirror(tmp_path) as url:
        listed(url)
        (directory / "config.json").unlink()
        status, _, body = file(url, "config.json")
        assert status >= 400
        assert not json.loads(body)["Success"]


def test_too_many_connections_are_told_so(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_MAX_CONNECTIONS", 1)
    with hub.mirror(models) as url:
        first = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        first.request("GET", "/")
        first.getresponse().read()
        assert ask(url, "/")[0] == 503
        first.close()


def test_nothing_to_serve(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no complete model"):
        mirror.create_server(tmp_path)
    with pytest.raises(NotFoundError, match="no directory"):
        mirror.create_server(tmp_path / "none")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_somebody_else(models: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        mirror.create_server(models, host)


def test_ipv6(models: Path, tmp_path: Path) -> None:
    server = mirror.create_server(models, "::1")
    server.server_close()
    assert server.url == f"http://[::1]:{server.server_port}"


@pytest.mark.parametrize("variable", ["MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"])
def test_stock_client_byte_for_byte(hub_url: str, tmp_path: Path, variable: str) -> None:
    program = str(Path(sys.executable).with_name("modelscope"))
    command = [program, "download", "--model", hub.MODEL, "--local_dir", str(tmp_path / "d")]
    subprocess.run(command, env=hub.environment(**{variable: hub_url}), capture_output=True, check=True, timeout=120)
    assert hub.contents(tmp_path / "d") == hub.FILES


def test_stock_python_client(hub_url: str, tmp_path: Path) -> None:
    script = f"from modelscope import snapshot_download; print(snapshot_download({hub.MODEL!r}))"
    env = hub.environment(MODELSCOPE_ENDPOINT=hub_url)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True, timeout=120)
    path = Path(done.stdout.decode().splitlines()[-1])
    assert hub.contents(path) == hub.FILES
    assert store.locate(ModelRef(hub.MODEL), Path(os.environ["MODELSCOPE_CACHE"])) == path
