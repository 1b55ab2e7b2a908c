"""`mdeploy cluster`: several machines that serve together, with Ray underneath."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import options, output
from mdeploy.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from mdeploy.cluster import Overview, Shares
    from mdeploy.serving.cluster_gcs import Node, Replica
    from mdeploy.specs import ServiceStatus

Cpus = Annotated[int | None, typer.Option("--cpus", min=0, metavar="N", help="Cores it gives. [default: all]")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=0, metavar="N", help="GPUs it gives. [default: all]")]
Memory = Annotated[
    int | None,
    typer.Option("--object-store-mib", min=75, metavar="MIB", help="Shared memory for what is sent. [default: Ray's]"),
]
_MOST_BYTES = 4096


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Several machines that serve together (Ray underneath).")
    group.command("start")(start)
    group.command("join")(join)
    group.command("status")(status)
    group.command("stop")(stop)
    app.add_typer(group, name="cluster")


def start(
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="IP", help="Its address for the others. [default: that of its route out]"),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1024, max=65535, help="Port the others join at.")] = 6379,
    cpus: Cpus = None,
    gpus: Gpus = None,
    store_mib: Memory = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Make this machine the head of a cluster.

    It runs in the background as the service `cluster`, until it is stopped. The token that the others need is made
    once and kept.
    """
    from mdeploy import cluster, settings
    from mdeploy.cli.launching import Progress

    loaded = settings.load()
    done = cluster.start(loaded, address, port, _shares(cpus, gpus, store_mib), Progress())
    found = cluster.membership(loaded)

    def human() -> str:
        output.say(f"this machine is the head of the cluster {found.address}")
        output.say(f"on the others: mdeploy cluster join {found.address}  (asks for the token in {found.token_file})")
        output.say("next: mdeploy serve app FILE.py --cluster -d · mdeploy cluster status")
        return found.address

    _emit(done, found.address, as_json=as_json, human=human)


def join(
    head: Annotated[str, typer.Argument(metavar="ADDRESS", help="IP or IP:PORT of the head.")],
    surplus: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", help="File with the token. [default: $MDEPLOY_CLUSTER_TOKEN, else it is asked for]"
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="IP", help="This machine's address. [default: that of its route there]"),
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    store_mib: Memory = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Make this machine a part of a cluster.

    It runs in the background as the service `cluster`, and comes back to a head that was away.
    """
    from mdeploy import cluster, settings
    from mdeploy.cli.launching import Progress

    if surplus:
        hint = "MDEPLOY_CLUSTER_TOKEN, --token-file, or type it when you are asked"
        raise UsageError("a token on the command line can be seen by everybody on this machine", hint=hint)
    loaded = settings.load()
    shares = _shares(cpus, gpus, store_mib)
    at = cluster.head_address(head)
    done = cluster.join(loaded, at, _token(token_file), address, shares, Progress())
    found = cluster.membership(loaded)

    def human() -> str:
        output.say(f"this machine ({found.ip}) is in the cluster {found.address}; mdeploy cluster status shows it")
        return found.address

    _emit(done, found.address, as_json=as_json, human=human)


def status(as_json: options.JsonFlag = False) -> None:
    """Show the machines of the cluster, and what runs where."""
    from mdeploy import cluster, settings

    found = cluster.overview(settings.load())
    output.emit({"cluster": _document(found)}, as_json=as_json, human=lambda: _tables(found))


def stop() -> None:
    """Take this machine out of its cluster.

    A head takes the cluster with it: services go on once there is a head again.
    """
    from mdeploy import cluster, settings

    loaded = settings.load()
    was_head = cluster.membership(loaded).is_head
    if not cluster.stop(loaded):
        output.say("this machine's part of the cluster was not running")
        return
    output.say("the cluster is stopped" if was_head else "this machine has left the cluster")


def _token(file: Path | None) -> str:
    """The token of the cluster to join, from where nobody else can read it."""
    if file is not None:
        from mdeploy.paths import expand

        try:
            return expand(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"cannot read the token in {file}: {why}", hint="--token-file FILE") from error
    from mdeploy.cluster import TOKEN_VARIABLE

    given = os.environ.get(TOKEN_VARIABLE, "")
    if given:
        return given.strip()
    if not sys.stdin.isatty():
        text = sys.stdin.buffer.read(_MOST_BYTES).decode(errors="replace").strip()
        if text:
            return text
        hint = "MDEPLOY_CLUSTER_TOKEN or --token-file; on the head it is in MDEPLOY_HOME/secrets/cluster.token"
        raise ConfigError("joining needs the token of the cluster", hint=hint)
    import getpass

    return getpass.getpass("token of the cluster: ").strip()


def _shares(cpus: int | None, gpus: int | None, store_mib: int | None) -> Shares:
    from mdeploy.cluster import Shares

    return Shares(cpus, gpus, None if store_mib is None else store_mib << 20)


def _emit(done: ServiceStatus, address: str, *, as_json: bool, human: Callable[[], str]) -> None:
    from mdeploy.cli.ps import row

    output.emit({"cluster": {"address": address}, "service": row(done)}, as_json=as_json, human=human)


def _document(found: Overview) -> dict[str, object]:
    import dataclasses

    mine = found.membership
    return {
        "address": mine.address,
        "ip": mine.ip,
        "head": mine.is_head,
        "ray": found.ray,
        "nodes": [dataclasses.asdict(node) for node in found.nodes],
        "replicas": [dataclasses.asdict(replica) for replica in found.replicas],
    }


def _tables(found: Overview) -> str:
    alive = [node for node in found.nodes if node.is_alive]
    gone = len(found.nodes) - len(alive)
    nodes = output.table(("NODE", "HOST", "ROLE", "CPUS FREE", "GPUS FREE"), [_node_cells(node) for node in alive])
    note = f"\n{gone} machine{'s' * (gone > 1)} left or did not answer" if gone else ""
    if not found.replicas:
        return f"{nodes}{note}\nno replicas; start some: mdeploy serve app FILE.py --cluster -d"
    columns = ("SERVICE", "HANDLER", "NODE", "PID", "STATE")
    return f"{nodes}{note}\n\n{output.table(columns, [_replica_cells(replica) for replica in found.replicas])}"


def _node_cells(node: Node) -> tuple[str, ...]:
    role = "head" if node.is_head else "node"
    return (node.ip, node.host, role, f"{node.cpus_free:g} of {node.cpus:g}", f"{node.gpus_free:g} of {node.gpus:g}")


def _replica_cells(replica: Replica) -> tuple[str, ...]:
    return (replica.service, replica.handler, replica.node, str(replica.pid or "-"), replica.state)
