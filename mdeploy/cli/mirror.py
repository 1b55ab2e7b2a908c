"""`mdeploy mirror`: the models of this machine as a hub for the machines beside it."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import options, output

if TYPE_CHECKING:
    from mdeploy.hub.mirror import MirrorServer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("mirror")(mirror)


def mirror(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds OWNER/NAME/ directories, or is a ModelScope cache.")
    ],
    host: options.Host = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8700,
) -> None:
    """Be a hub for other machines.

    Serves models in ModelScope's own protocol, read-only.
    The stock SDK and `mdeploy download` both take it for a hub, without internet. Ends with
    Ctrl-C or SIGTERM.
    """
    from mdeploy import settings
    from mdeploy.hub.mirror import create_server
    from mdeploy.paths import expand

    address = settings.load(flags={"host": host}).require("host")
    server = create_server(expand(directory), address, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _introduce(server, directory, address)
        thread.join()
    except KeyboardInterrupt:
        output.say("mirror stopped")
    finally:
        server.server_close()


def _introduce(server: MirrorServer, directory: Path, address: str) -> None:
    """Hash everything, so that the first client need not wait for it, and say how to become one."""
    output.say(f"reading the models under {directory} …")
    rows = [row for model in server.catalog.ids() for row in _rows(server, model)]
    output.say(output.table(("MODEL", "REVISION", "FILES", "SIZE"), rows))
    here, port = server.url, server.server_port
    url = here if address not in ("0.0.0.0", "::") else f"http://{_own_address()}:{port}"
    output.say(f"mirror ready on {url}, read-only; Ctrl-C stops it")
    output.say(f"  {_reach(address, port)}")
    output.say("on a client:")
    example = rows[0][0] if rows else "OWNER/NAME"
    output.say(f"  MODELSCOPE_ENDPOINT={url} mdeploy download {example}")
    output.say(f"  MODELSCOPE_ENDPOINT={url} modelscope download --model {example}")


def _rows(server: MirrorServer, model: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for revision in server.catalog.revisions(model):
        try:
            found = server.catalog.snapshot(model, revision)
        except OSError as error:
            output.say(f"  {model} cannot be served: {error.filename}: {error.strerror}")
            continue
        if found is not None:
            rows.append((model, revision, str(len(found.files)), output.human_bytes(found.bytes)))
    return rows


def _reach(address: str, port: int) -> str:
    if address in ("127.0.0.1", "localhost", "::1"):
        return "only this machine can reach it; for others: --host 0.0.0.0"
    return f"anyone who can reach port {port} of {address} can read these models, without a password"


def _own_address() -> str:
    """The address other machines most likely know us by; no packet is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
        return str(probe.getsockname()[0])
    return socket.gethostname()
