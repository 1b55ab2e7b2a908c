"""The server under the edge: uvicorn's protocol on uvloop, with a listening socket and an end of our own.

Signals are the caller's business. Nothing ticks while nothing is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import resource
import socket
from dataclasses import dataclass, field
from typing import Any

from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import ServerState

from mdeploy.errors import ConfigError
from mdeploy.serving.httpd_connection import Connection, ConnectionLimits, limited

_log = logging.getLogger("mdeploy.serving")

_LAST_WORDS_S = 1.0
_POLL_S = 0.05
_SPARE_FILES = 256
"""Descriptors that are not for connections: workers' sockets, shared memory, logs."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server meets its clients. Times in seconds.

    `drain_s` is what requests in flight get at the end, `keep_alive_s` an idle connection.
    """

    drain_s: float = 30.0
    keep_alive_s: float = 75.0
    backlog: int = 4096
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, and listens once it is served. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise _taken(host, port, error) from error
    sock.setblocking(False)
    return sock


def _taken(host: str, port: int, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    hint = f"take another --port, or see who has it: ss -ltnp 'sport = :{port}'"
    return ConfigError(f"cannot listen on {host}:{port}: {reason}", hint=hint)


async def serve(app: Any, sock: socket.socket, options: ServerOptions, stopping: asyncio.Event) -> None:
    """Answer until `stopping` is set and what was in flight is answered. Raises ConfigError where it cannot listen."""
    config = Config(
        app,
        http=limited(_affordable(options.limits)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type] # seconds of call_later
    )
    config.load()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    lifespan = LifespanOn(config)
    await lifespan.startup()
    if lifespan.should_exit:
        raise ConfigError("the application did not start; the log says why")
    try:
        await _until_drained(config, lifespan.state, sock, options, stopping)
    finally:
        await lifespan.shutdown()


async def _until_drained(
    config: Config, state: dict[str, Any], sock: socket.socket, options: ServerOptions, stopping: asyncio.Event
) -> None:
    everything = ServerState()
    everything.default_headers = [(b"server", b"mdeploy")]
    loop = asyncio.get_running_loop()

    def connection() -> asyncio.Protocol:
        made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=everything, app_state=state
        )
        return made

    host, port = sock.getsockname()[:2]
    try:
        sock.listen(options.backlog)  # uvloop tells nobody where that fails: two may have bound an address at once
        server = await loop.create_server(connection, sock=sock, backlog=options.backlog)
    except OSError as error:
        raise _taken(host, port, error) from error
    try:
        await stopping.wait()
    finally:
        server.close()
        await _drain(everything, options.drain_s)


def _affordable(limits: ConnectionLimits) -> ConnectionLimits:
    """Raise the limit of open files as far as we may, and take no more connections than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    files = soft if soft != resource.RLIM_INFINITY else limits.connections + _SPARE_FILES
    connections = min(limits.connections, max(files - _SPARE_FILES, files // 2))
    return dataclasses.replace(limits, connections=connections)


async def _drain(state: ServerState, seconds: float) -> None:
    """Let what is in flight end; after `seconds` cancel it, and give it a moment to say so."""
    for connection in _connections(state):
        connection.shutdown()
    if not await _is_idle(state, seconds):
        _log.warning("%d requests were cut off after %g s", len(state.tasks), seconds)
        for task in tuple(state.tasks):
            task.cancel()
        await _is_idle(state, _LAST_WORDS_S)
    for connection in _connections(state):
        connection.abort()


async def _is_idle(state: ServerState, seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while state.tasks or state.connections:
        if loop.time() >= until:
            return not state.tasks
        await asyncio.sleep(_POLL_S)
    return True


def _connections(state: ServerState) -> tuple[Connection, ...]:
    return tuple(each for each in state.connections if isinstance(each, Connection))
