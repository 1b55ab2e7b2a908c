"""A model hub for the machines next to this one: directories served in ModelScope's protocol, read-only.

Speaks what the stock SDK (1.37 to 1.40) and `mdeploy download` ask for. Files go out by sendfile,
connections are kept alive, and nothing is printed: whoever starts the server talks to people.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
import sys
import threading
import uuid
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.hub.catalog import Catalog, Snapshot
from mdeploy.hub.refs import DEFAULT_REVISION

_MAX_CONNECTIONS = 256
_IDLE_S = 60.0
# What modelscope.cn answers for a model it does not have.
_NO_SUCH_MODEL = 10010205001
_ROUTE = re.compile(r"/api/v1/models/([^/]+/[^/]+)(/repo/files|/repo|/revisions|)/?")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def create_server(root: Path, host: str = "127.0.0.1", port: int = 0) -> MirrorServer:
    """A bound server for the models under `root`; call `serve_forever` on it. Port 0 takes a free one.

    Raises NotFoundError where there are no models, ConfigError for an address it cannot have.
    """
    if not root.is_dir():
        raise NotFoundError(f"no directory {root}", hint="give one that holds OWNER/NAME/ or a ModelScope cache")
    catalog = Catalog(root)
    if not catalog.ids():
        raise NotFoundError(
            f"no complete model under {root}",
            hint="expected OWNER/NAME/ with files in it, or a ModelScope cache; mdeploy download OWNER/NAME makes one",
        )
    try:
        return MirrorServer(catalog, host, port)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(error, host, port) from error


def _cannot_listen(error: Exception, host: str, port: int) -> ConfigError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use", hint=f"choose another: --port {port + 1}")
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"cannot listen on {host} port {port}: {reason}", hint="choose other --host and --port")


class MirrorServer(ThreadingHTTPServer):
    """Serves a catalog. Threads are bounded, and closing it ends every connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, catalog: Catalog, host: str, port: int) -> None:
        self.catalog = catalog
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._open: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Base URL on this machine."""
        host, port = self.server_address[:2]
        text = str(host)
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(text, text)
        return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up of our own name, which can take seconds offline."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until `shutdown` is called from another thread."""
        super().serve_forever(poll_interval)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or turn it away when there are too many."""
        if not self._slots.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(
                    b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.shutdown_request(request)
            return
        self._open.add(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection from first to last request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: socket.socket) -> None:
        self._open.discard(request)
        self._slots.release()

    def server_close(self) -> None:
        """Stop listening and cut the connections that are left."""
        super().server_close()
        for request in tuple(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error; a fault of ours surfaces in its thread."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            raise error


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mdeploy-mirror"
    sys_version = ""
    timeout = _IDLE_S
    disable_nagle_algorithm = True

    @property
    def _catalog(self) -> Catalog:
        return cast(MirrorServer, self.server).catalog

    def do_GET(self) -> None:
        """Answer a request with its body."""
        if self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
        self._answered = False
        try:
            self._route()
        except (ConnectionError, TimeoutError):
            raise
        except (OSError, ValueError) as error:
            self._broke(error)

    def _broke(self, error: Exception) -> None:
        """The disk, or a request nobody can parse; after the headers only a cut tells the client."""
        self.close_connection = True
        if not self._answered:
            status = HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, OSError) else HTTPStatus.BAD_REQUEST
            reason = getattr(error, "strerror", None) or "bad request"
            self._json(status, {"Code": int(status), "Data": {}, "Message": reason, "Success": False})

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""

    def _route(self) -> None:
        url = urlsplit(self.path)
        match = _ROUTE.fullmatch(unquote(url.path))
        if not match:
            self._missing(f"no such interface: {url.path}", code=404)
            return
        model, action = match.groups()
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        answers = {"/repo/files": self._files, "/repo": self._file, "/revisions": self._revisions, "": self._info}
        if action in ("", "/revisions") and not self._catalog.revisions(model):
            self._no_model(model)
        else:
            answers[action](model, query)

    def _no_model(self, model: str) -> None:
        self._missing(f"no model {model} on this mirror")

    def _info(self, model: str, query: dict[str, str]) -> None:
        owner, _, name = model.partition("/")
        self._data({"Path": owner, "Name": name, "Revision": DEFAULT_REVISION, "Visibility": 5})

    def _revisions(self, model: str, query: dict[str, str]) -> None:
        branches = [
            {"Revision": name, "CreatedAt": int(path.stat().st_mtime)}
            for name, path in self._catalog.revisions(model).items()
        ]
        self._data({"RevisionMap": {"Branches": branches, "Tags": []}})

    def _files(self, model: str, query: dict[str, str]) -> None:
        """The listing; an unknown revision is `Files: null` with status 200, as on the real hub."""
        snapshot = self._catalog.snapshot(model, query.get("Revision") or DEFAULT_REVISION)
        if snapshot is None and not self._catalog.revisions(model):
            self._no_model(model)
            return
        if snapshot is None:
            self._data({"Files": None, "IsVisual": 0, "LatestCommitter": None})
            return
        root = query.get("Root", "").strip("/")
        deep = query.get("Recursive", "").lower() in ("true", "1")
        entries = [entry for entry in _entries(snapshot) if _is_below(entry["Path"], root, deep)]
        self._data({"Files": entries, "IsVisual": 0, "LatestCommitter": {"ShortId": snapshot.commit[:8]}})

    def _file(self, model: str, query: dict[str, str]) -> None:
        snapshot = self._catalog.snapshot(model, query.get("Revision") or DEFAULT_REVISION)
        name = query.get("FilePath", "")
        file = snapshot.file(name) if snapshot else None
        if snapshot is None or file is None:
            self._missing(f"no file {name!r} in {model}")
            return
        self._send_file(snapshot.path / name, file.size, f'"{file.sha256}"', snapshot.commit)

    def _send_file(self, path: Path, size: int, etag: str, commit: str) -> None:
        wanted = self._range(size, etag)
        if wanted is None:
            self._headers(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, {"Content-Range": f"bytes */{size}"})
            return
        start, end = wanted
        part = (start, end) != (0, size)
        extra = {"ETag": etag, "X-Linked-ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        extra |= {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if part else {}
        with path.open("rb", buffering=0) as file:
            self._headers(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK, end - start, extra)
            if self.command == "HEAD" or start == end:
                return
            if self.connection.sendfile(file, start, end - start) != end - start:
                self.close_connection = True  # the file shrank: the client must see a short body, not wait

    def _range(self, size: int, etag: str) -> tuple[int, int] | None:
        """[start, end) to send; everything for a header we need not honour, None for one nobody can."""
        match = _RANGE.fullmatch(self.headers.get("Range", "").strip())
        first, last = match.groups() if match else ("", "")
        if not (first or last) or self.headers.get("If-Range", etag) != etag:
            return 0, size
        if not first:
            return (max(0, size - int(last)), size) if int(last) and size else None
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return 0, size
        return (start, end) if start < size else None

    def _data(self, data: object) -> None:
        self._json(HTTPStatus.OK, {"Code": 200, "Data": data, "Message": "success", "Success": True})

    def _missing(self, why: str, code: int = _NO_SUCH_MODEL) -> None:
        self._json(HTTPStatus.NOT_FOUND, {"Code": code, "Data": {}, "Message": why, "Success": False})

    def _json(self, status: HTTPStatus, document: dict[str, object]) -> None:
        body = json.dumps({**document, "RequestId": uuid.uuid4().hex}, ensure_ascii=False).encode()
        self._headers(status, len(body), {"Content-Type": "application/json; charset=utf-8"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _headers(self, status: HTTPStatus, length: int, extra: dict[str, str]) -> None:
        self._answered = True
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **extra}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _entries(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Files and directories in the shape of the hub's listing."""
    common = {"Revision": snapshot.commit}
    trees = [{"Path": p, "Name": p.rpartition("/")[2], "Type": "tree", "Size": 0, **common} for p in snapshot.trees]
    blobs = [
        {
            "Path": f.path,
            "Name": f.path.rpartition("/")[2],
            "Type": "blob",
            "Size": f.size,
            "Sha256": f.sha256,
            **common,
        }
        for f in snapshot.files
    ]
    return trees + blobs


def _is_below(path: str, root: str, deep: bool) -> bool:
    if root and not path.startswith(f"{root}/"):
        return False
    rest = path[len(root) + 1 :] if root else path
    return deep or "/" not in rest
