"""Machines that work together: what `mdeploy cluster` does. Each machine's part is a service named `cluster`.

So `ps`, `logs` and `stop` know it as they know any service; a unit of systemd it cannot be. The token that lets
machines and services in lies in HOME/secrets/cluster.token and goes to Ray through the environment; no command line
and no log has it.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mdeploy import dispatch, reservations, services
from mdeploy.errors import AlreadyRunningError, ConfigError, NotFoundError, UnavailableError, UsageError
from mdeploy.paths import Paths
from mdeploy.serving import cluster_node
from mdeploy.serving.cluster_gcs import Head, Node, Replica
from mdeploy.serving.cluster_node import NodeOptions
from mdeploy.settings import Settings
from mdeploy.specs import Limits, Probe, ServiceSpec, ServiceStatus
from mdeploy.supervise import state
from mdeploy.supervise.ports import check_port
from mdeploy.supervise.state import ServiceFiles

NAME = cluster_node.SERVICE
TOKEN_VARIABLE = "MDEPLOY_CLUSTER_TOKEN"
"""Where `join` looks for the token before it asks."""

_LIMITS = Limits(start_timeout_s=120.0, hang_timeout_s=120.0, stop_timeout_s=20.0)
OnProgress = Callable[[ServiceStatus], None]


@dataclass(frozen=True, slots=True)
class Shares:
    """What this machine gives to the cluster; None: all it has."""

    cpus: int | None = None
    gpus: int | None = None
    store_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Membership:
    """This machine's place in a cluster: the head's IP:PORT, its own address, the file with the token."""

    address: str
    ip: str
    is_head: bool
    token_file: Path


@dataclass(frozen=True, slots=True)
class Overview:
    """A cluster as its head tells of it."""

    membership: Membership
    ray: str
    nodes: tuple[Node, ...]
    replicas: tuple[Replica, ...]


def membership(settings: Settings) -> Membership:
    """This machine's place. Raises ConfigError where it has none."""
    spec = _spec_of_before(settings)
    if spec is None:
        hint = "mdeploy cluster start, or mdeploy cluster join ADDRESS"
        raise ConfigError("this machine is in no cluster", hint=hint)
    options = cluster_node.parse(spec.argv[3:])
    return Membership(options.address, options.ip, options.is_head, token_file(settings.paths))


def _spec_of_before(settings: Settings) -> ServiceSpec | None:
    """What `start` or `join` left; None where they did not run. Raises ConfigError for a service of somebody's."""
    try:
        spec = ServiceFiles(settings.paths, NAME).spec()
    except NotFoundError:
        return None
    if spec.kind != NAME:
        hint = f"serve it again under another --name, then: rm -r {settings.paths.service(NAME)}"
        raise ConfigError(f"a service of another kind is called {NAME}", hint=hint)
    return spec


def token_file(paths: Paths) -> Path:
    """Where the token is kept."""
    return paths.secrets / "cluster.token"


# start and join


def start(settings: Settings, ip: str | None, port: int, shares: Shares, progress: OnProgress) -> ServiceStatus:
    """Make this machine the head of a cluster and wait until it works. The token of before is kept."""
    _check_installed()
    if port in cluster_node.PORTS_OF_RAY:
        hint = "any but 8265, 52365 and 10002 to 19999"
        raise UsageError(f"--port {port}: one that Ray's own processes take", hint=hint)
    _check_stopped(settings)
    own = _own_address(ip)
    check_port(own, port)
    _keep_token(settings.paths, _kept_token(settings.paths) or secrets.token_hex(32))
    return _launch(settings, f"{own}:{port}", own, shares, progress, is_head=True)


def join(
    settings: Settings, address: str, token: str, ip: str | None, shares: Shares, progress: OnProgress
) -> ServiceStatus:
    """Make this machine a part of the cluster at `address`, for which it must have the token.

    Raises UnavailableError where nobody answers there, ConfigError for another token or another version.
    """
    _check_installed()
    _check_stopped(settings)
    head = Head(head_address(address), check_token(token))
    head.versions()
    own = _own_address(ip, towards=head.address)
    _keep_token(settings.paths, token)
    return _launch(settings, head.address, own, shares, progress, is_head=False)


def check_token(text: str) -> str:
    """The token itself, if it can be one. Raises ConfigError, token unsaid."""
    if not re.fullmatch(r"[!-~]{16,}", text):
        hint = "on the head it is in MDEPLOY_HOME/secrets/cluster.token"
        raise ConfigError("that is no token: 16 characters or more, without blanks", hint=hint)
    return text


def stop(settings: Settings) -> bool:
    """Take this machine out of its cluster; True where it was in. A head takes the cluster with it."""
    membership(settings)
    return services.stop_service(settings, NAME)


def _launch(
    settings: Settings, address: str, ip: str, shares: Shares, progress: OnProgress, *, is_head: bool
) -> ServiceStatus:
    paths = settings.paths
    with reservations.locked(paths):
        port = reservations.free_port("127.0.0.1", reservations.neighbours(paths, [NAME]))
        options = NodeOptions(address, ip, port, is_head, shares.cpus, shares.gpus, shares.store_bytes)
        spec = _spec(paths, options)
        reservations.claim(paths, spec)
        dispatch.write_spec(ServiceFiles(paths, NAME), spec)
    return services.launch(settings, NAME, progress)


def _spec(paths: Paths, options: NodeOptions) -> ServiceSpec:
    """A service whose HTTP tells how the machine is. One that joined comes back for as long as its head is away."""
    return ServiceSpec(
        name=NAME,
        kind=NAME,
        argv=(sys.executable, "-m", "mdeploy.apps.cluster", *options.argv()),
        env={},
        cwd=str(paths.service(NAME)),
        host="127.0.0.1",
        port=options.http_port,
        probe=Probe("/health", "/ready", {}),
        model=f"{'head' if options.is_head else 'node of'} {options.address}",
        secrets={cluster_node.TOKEN_VARIABLE: str(token_file(paths))},
        limits=_LIMITS,
        restart="always",
    )


def _check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("a cluster needs Ray, which is not installed", hint="pip install 'mdeploy[ray]'")


def _check_stopped(settings: Settings) -> None:
    before = _spec_of_before(settings)
    if before is not None and ServiceFiles(settings.paths, NAME).is_supervised():
        found = membership(settings)
        what = "the head of" if found.is_head else "in"
        raise AlreadyRunningError(f"this machine is {what} the cluster {found.address}", hint="mdeploy cluster stop")


# tokens


def _kept_token(paths: Paths) -> str:
    file = token_file(paths)
    try:
        return file.read_text(encoding="utf-8").strip() if file.exists() else ""
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="act as its owner: sudo mdeploy …") from error


def _keep_token(paths: Paths, token: str) -> None:
    if _kept_token(paths) != token:
        state.make_private(paths.secrets)
        state.write_atomically(token_file(paths), f"{token}\n".encode())


# addresses


def head_address(text: str) -> str:
    """HOST or HOST:PORT as IP:PORT. Raises UsageError for what is neither, UnavailableError for an unknown name."""
    host, colon, port = text.partition(":")
    if not host or "/" in text or (colon and not (port.isdecimal() and port.isascii() and 0 < int(port) < 65536)):
        raise UsageError(
            f"{text!r} is no address of a head", hint=f"IP or IP:PORT, like 10.0.0.1:{cluster_node.DEFAULT_PORT}"
        )
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "that is no host name"
        raise UnavailableError(f"{host}: {why}", hint="name the head by its IP address") from error
    return f"{found[0][4][0]}:{port or cluster_node.DEFAULT_PORT}"


def _own_address(named: str | None, towards: str = "192.0.2.1:9") -> str:
    """The address the other machines know this one by: the one named, else the one it has on the way to them.

    Raises UsageError for what is no address of this machine.
    """
    if named is not None:
        return _checked(named)
    host, _, port = towards.partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        try:
            probe.connect((host, int(port)))
        except OSError as error:
            hint = "name one that the other machines reach: --address IP"
            raise ConfigError("this machine has no address towards a network", hint=hint) from error
        return str(probe.getsockname()[0])


def _checked(named: str) -> str:
    try:
        address = ipaddress.IPv4Address(named)
    except ValueError as error:
        raise UsageError(
            f"--address {named}: no IPv4 address", hint="ip -4 addr shows those of this machine"
        ) from error
    if address.is_unspecified or address.is_loopback:  # Ray itself takes another one in the place of these
        raise UsageError(f"--address {named}: one that other machines know this one by", hint="ip -4 addr shows them")
    try:
        check_port(named, 0)
    except ConfigError as error:
        raise UsageError(f"{named} is no address of this machine", hint="ip -4 addr shows them") from error
    return named


# look


def overview(settings: Settings) -> Overview:
    """The cluster this machine is in. Raises ConfigError where it is in none, UnavailableError where nobody answers."""
    found = membership(settings)
    head = Head(found.address, _kept_token(settings.paths))
    try:
        return Overview(found, head.versions().ray, head.nodes(), head.replicas())
    except UnavailableError as error:
        error.hint = "mdeploy cluster start" if found.is_head else "is the head up? there: mdeploy cluster status"
        raise
