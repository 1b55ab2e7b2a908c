"""One nginx site in front of the servers of a service. A value in, text out; nothing here looks at the machine.

What was measured and read in nginx's source, and decided because of it:

* `non_idempotent` is what lets a POST be sent to another server; without it every request in flight at a crash fails.
* Statuses are not retried. A 503 of ours means that a queue is full: were it named in `proxy_next_upstream`, nginx
  would also take that server for dead, and an overload of one would become an outage of all.
* One retry and no more: a request that kills a server must not walk through all of them. A failure on a connection
  that was used before is not counted as a try, so engines, which a request can kill, get a new one for each request.
  Apps, whose workers die in their place, do without that cost.
* Idle connections are given up before the server does it (5 s in uvicorn and vLLM): a request sent onto a connection
  that is just being closed counts as a failure of the server.
* `map` compares strings without regard to case, which a key must not be: keys are matched as regular expressions.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from mdeploy.errors import UsageError
from mdeploy.export.address import Address
from mdeploy.export.rendered import MARK

Guard = Literal["pass", "ask", "add"]
"""Who deals with keys: the servers, nginx for them (a client must have one), or nginx for the clients."""

DEFAULT_BODY_BYTES = 64 << 20
_TRIES = 2
_LLM_PATHS = ("/v1/", "/v2/", "/inference/")
"""What vLLM guards with its key, and all a client needs; the rest, control of the engine among it, stays inside."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of the certificate chain and its key."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Site:
    """A service behind nginx. `key_file` is what the site includes where nginx has to know `keys`."""

    service: str
    kind: str
    servers: tuple[Address, ...]
    listen: tuple[Address, ...]
    names: tuple[str, ...] = ()
    tls: Tls | None = None
    max_body_bytes: int = DEFAULT_BODY_BYTES
    guard: Guard = "pass"
    key_file: str = ""
    keys: tuple[str, ...] = field(default=(), repr=False)

    @property
    def id(self) -> str:
        """What its upstream and variables are called; two services never share one."""
        plain = re.sub(r"[^a-z0-9]", "_", self.service.lower())
        unique = "" if plain == self.service else f"_{zlib.crc32(self.service.encode()):08x}"
        return f"mdeploy_{plain}{unique}"


def check(site: Site) -> None:
    """Raises UsageError for values that nginx would read as something else."""
    twice = sorted({str(one) for one in site.servers if site.servers.count(one) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)} is named twice", hint="name every server once")
    if not site.servers:
        raise UsageError("there is no server to send requests to", hint="--server HOST:PORT")
    for name in site.names:
        if not re.fullmatch(r"_|[A-Za-z0-9*.-]+", name):
            raise UsageError(f"--server-name {name}: no host name", hint="--server-name api.example.org")
    for path in (site.tls.certificate, site.tls.key, site.key_file) if site.tls else (site.key_file,):
        if re.search(r"[$\x00-\x1f]", path):
            raise UsageError(f"{path!r}: nginx would take $ in a path for a variable", hint="use another path")
    if re.search(r"[*?[]", site.key_file):
        raise UsageError(f"{site.key_file!r}: nginx would take it for a pattern of files", hint="use another path")


def render(site: Site) -> str:
    """The site, to be read in nginx's http context."""
    check(site)
    blocks = [_head(site), _upstream(site), _maps(site), _server(site)]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def render_keys(site: Site) -> str:
    """The include that holds the keys; only its owner may read it."""
    lines = [f"{MARK}nginx {site.service}`: keys, for nobody's eyes but nginx's."]
    if site.guard == "add":
        # values of geo are taken literally: elsewhere a $ would begin a variable
        lines += [f"geo ${site.id}_key {{", f"    default {_quoted(f'Bearer {site.keys[0]}')};"]
    else:
        lines += [f'map "$request_method $http_authorization" ${site.id}_known {{']
        lines += ["    default 0;", '    "~^OPTIONS " 1;']
        lines += [rf'    "~^[A-Z]+ (?i:Bearer) +{_hex(key)}\z" 1;' for key in site.keys]
    return "\n".join([*lines, "}", ""])


def _head(site: Site) -> Iterator[str]:
    yield f"{MARK}nginx {site.service}`, which writes it again: changes belong into a file of your own."
    yield "# It is read in the http context: /etc/nginx/conf.d/ or sites-enabled/. Then: nginx -t && nginx -s reload"


def _upstream(site: Site) -> Iterator[str]:
    yield f"upstream {site.id} {{"
    yield f"    zone {site.id} 64k;"
    yield "    least_conn;"
    yield "    # After one failure a server gets nothing for 5 s, then one request that finds out whether it is back."
    yield from (f"    server {address} max_fails=1 fail_timeout=5s;" for address in site.servers)
    if site.kind != "llm":
        yield "    # Shorter than the 5 s after which the servers hang up."
        yield "    keepalive 64;"
        yield "    keepalive_timeout 3s;"
    yield "}"


def _maps(site: Site) -> Iterator[str]:
    yield f"map $http_upgrade ${site.id}_connection {{"
    yield "    default upgrade;"
    yield '    "" "";'
    yield "}"
    yield f"map $http_x_request_id ${site.id}_request {{"
    yield "    default $request_id;"
    yield '    "~^[A-Za-z0-9._-]{1,64}\\z" $http_x_request_id;'
    yield "}"
    if site.guard != "pass":
        yield f"include {_quoted(site.key_file)};"


def _server(site: Site) -> Iterator[str]:
    yield "server {"
    for part in (_listen, _requests, _servers_asked, _answers, _locations, _errors):
        yield from (f"    {line}" for line in part(site))
    yield "}"


def _listen(site: Site) -> Iterator[str]:
    ssl = " ssl" if site.tls else ""
    for address in site.listen:
        if address.is_any:
            yield f"listen {address.port}{ssl};"
            yield f"listen [::]:{address.port}{ssl};"
        else:
            yield f"listen {address}{ssl};"
    yield f"server_name {' '.join(site.names or ('_',))};"
    if site.tls:
        yield f"ssl_certificate {_quoted(site.tls.certificate)};"
        yield f"ssl_certificate_key {_quoted(site.tls.key)};"
        yield "ssl_protocols TLSv1.2 TLSv1.3;"
        yield f"ssl_session_cache shared:{site.id}_tls:1m;"
        yield "ssl_session_timeout 1d;"


def _requests(site: Site) -> Iterator[str]:
    yield f"client_max_body_size {site.max_body_bytes};"
    yield "client_body_buffer_size 1m;"
    yield "server_tokens off;"
    yield "# A body is read to its end first: nginx can send again only what it has."
    yield "proxy_request_buffering on;"
    yield "proxy_http_version 1.1;"
    yield "proxy_set_header Host $host;"
    yield f"proxy_set_header Connection ${site.id}_connection;"
    yield "proxy_set_header Upgrade $http_upgrade;"
    yield f"proxy_set_header X-Request-Id ${site.id}_request;"
    yield "proxy_set_header X-Real-IP $remote_addr;"
    yield "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
    yield "proxy_set_header X-Forwarded-Host $http_host;"
    yield "proxy_set_header X-Forwarded-Port $server_port;"
    yield "proxy_set_header X-Forwarded-Proto $scheme;"
    if site.guard == "add":
        yield f"proxy_set_header Authorization ${site.id}_key;"


def _servers_asked(site: Site) -> Iterator[str]:
    yield "# No status is retried: a 503 means a full queue, and would count as a failure of its server."
    yield "proxy_next_upstream error timeout non_idempotent;"
    yield f"proxy_next_upstream_tries {_TRIES};"
    yield "proxy_connect_timeout 2s;"
    yield "proxy_send_timeout 60s;"
    yield "# The service has deadlines of its own. That a machine vanished is for TCP to notice, and takes it hours"
    yield "# unless: sysctl -w net.ipv4.tcp_keepalive_time=10 net.ipv4.tcp_keepalive_intvl=3"
    yield "# net.ipv4.tcp_keepalive_probes=3 net.ipv4.tcp_retries2=5"
    yield "proxy_read_timeout 1h;"
    yield "proxy_socket_keepalive on;"


def _answers(site: Site) -> Iterator[str]:
    yield "# Streams reach the client token by token."
    yield "proxy_buffering off;"
    yield "gzip off;"
    yield "proxy_hide_header X-Request-Id;"
    yield _request_id(site)


def _request_id(site: Site) -> str:
    return f"add_header X-Request-Id ${site.id}_request always;"


def _locations(site: Site) -> Iterator[str]:
    asked = [f"if (${site.id}_known = 0) {{", "    return 401;", "}"] if site.guard == "ask" else []
    proxied = [f"proxy_pass http://{site.id};"]
    yield from _block("location = /metrics", ["# Those of one server, taken at random, are nobody's.", "return 404;"])
    yield from _block("location = /health", proxied)
    if site.kind == "llm":
        for path in _LLM_PATHS:
            yield from _block(f"location {path}", [*asked, *proxied])
        yield from _block("location /", ["# The engine's own controls ask for no key.", "return 404;"])
    else:
        if asked:  # the page; its requests carry the key
            yield from _block("location = /", proxied)
        yield from _block("location /", [*asked, *proxied])


def _errors(site: Site) -> Iterator[str]:
    for status, kind, code, message, header in _ERRORS:
        document = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
        headers = [_request_id(site), *([f"add_header {header} always;"] if header else [])]
        yield f"error_page {status} @{site.id}_{status};"
        yield from _block(
            f"location @{site.id}_{status}",
            ["default_type application/json;", *headers, f"return {status} '{document}';"],
        )


_ERRORS = (
    (401, "authentication_error", "invalid_api_key", "a valid API key is needed", "WWW-Authenticate Bearer"),
    (404, "not_found_error", "not_found", "there is nothing at this path", ""),
    (413, "invalid_request_error", "body_too_large", "the body is too large", ""),
    (502, "server_error", "unavailable", "no server of this service answered", "Retry-After 5"),
    (504, "server_error", "deadline_exceeded", "the service did not answer in time", ""),
)
"""Errors of nginx itself, in the shape the services have; theirs pass through as they are."""


def _block(head: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"{head} {{"
    yield from (f"    {line}" for line in lines)
    yield "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _hex(key: str) -> str:
    """A key as a regular expression that needs no quoting of any kind."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{ord(char):02x}" for char in key)
