"""Questions to the head of a Ray cluster (its GCS), asked directly: quick, and with an answer to a wrong token.

Ray's own client says the same of a wrong address and a wrong token: nothing, for 40 seconds. This file knows Ray's
messages and nothing of services or files of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mdeploy.errors import ConfigError, UnavailableError

_TIMEOUT_S = 5.0
_REPLICA = "SERVE_REPLICA::"
_STATES = ("waiting", "starting", "running", "restarting", "dead")
"""Ray's states of an actor, in the order of their numbers."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a cluster. `cpus` and `gpus` are what it gives, `*_free` what nobody has taken."""

    id: str
    ip: str
    host: str
    is_head: bool
    is_alive: bool
    cpus: float
    gpus: float
    cpus_free: float
    gpus_free: float


@dataclass(frozen=True, slots=True)
class Replica:
    """One process of a service somewhere in a cluster."""

    service: str
    handler: str
    node: str
    pid: int
    state: str


@dataclass(frozen=True, slots=True)
class Versions:
    """What all machines of a cluster must have in common."""

    ray: str
    python: str


class Head:
    """The head at HOST:PORT, asked with a token.

    Every method raises UnavailableError where nobody answers, ConfigError where the token is another.
    """

    def __init__(self, address: str, token: str, timeout_s: float = _TIMEOUT_S) -> None:
        self.address, self._timeout_s = address, timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),)

    def versions(self) -> Versions:
        """Versions of the head."""
        found = self._ask("InternalKV", "InternalKVGet", key=b"CLUSTER_METADATA", namespace=b"cluster")
        try:
            document = json.loads(found.value)
            return Versions(document["ray_version"], document["python_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{self.address} is no head of a Ray cluster") from error

    def cluster_id(self) -> str:
        """Changes when the head begins anew, with nothing of what was before."""
        return bytes(self._ask("NodeInfo", "GetClusterId").cluster_id).hex()

    def nodes(self) -> tuple[Node, ...]:
        """Every machine that is, or was, in the cluster; the head first."""
        free = {
            usage.node_id: usage.resources_available
            for usage in self._ask("NodeResourceInfo", "GetAllResourceUsage").resource_usage_data.batch
        }
        found = self._ask("NodeInfo", "GetAllNodeInfo").node_info_list
        nodes = (_node(info, free.get(info.node_id, {})) for info in found)
        return tuple(sorted(nodes, key=lambda node: (not node.is_head, not node.is_alive, node.ip)))

    def replicas(self) -> tuple[Replica, ...]:
        """Every process of a service."""
        where = {node.id: node.ip for node in self.nodes()}
        actors = self._ask("ActorInfo", "GetAllActorInfo").actor_table_data
        return tuple(sorted(_replicas(actors, where), key=lambda r: (r.service, r.handler, r.node, r.pid)))

    def _ask(self, service: str, method: str, **fields: Any) -> Any:
        import grpc
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

        # a proxy of the environment is for the internet, not for machines of ours
        with grpc.insecure_channel(self.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = getattr(gcs_service_pb2_grpc, f"{service}GcsServiceStub")(channel)
            request = getattr(gcs_service_pb2, f"{method}Request")(**fields)
            try:
                return getattr(stub, method)(request, timeout=self._timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                raise self._failed(error) from error

    def _failed(self, error: Any) -> Exception:
        if error.code().name == "UNAUTHENTICATED":
            hint = "on the head it is in MDEPLOY_HOME/secrets/cluster.token"
            return ConfigError(f"the cluster at {self.address} has another token", hint=hint)
        why = (error.details() or error.code().name).rpartition(": ")[2]
        hint = "is the head up (there: mdeploy cluster status), and does a firewall let its port through?"
        return UnavailableError(f"no cluster answers at {self.address}: {why}", hint=hint)


def _node(info: Any, free: Mapping[str, float]) -> Node:
    total = info.resources_total
    return Node(
        id=info.node_id.hex(),
        ip=info.node_manager_address,
        host=info.node_manager_hostname,
        is_head=info.is_head_node,
        is_alive=info.state == 0,
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        cpus_free=free.get("CPU", 0.0),
        gpus_free=free.get("GPU", 0.0),
    )


def _replicas(actors: Any, where: Mapping[str, str]) -> Iterator[Replica]:
    for actor in actors:
        if not actor.name.startswith(_REPLICA):
            continue
        app, _, _ = actor.name.removeprefix(_REPLICA).partition("#")
        service, _, handler = app.rpartition(":")
        state = _STATES[actor.state] if actor.state < len(_STATES) else "unknown"
        if state != "dead":
            yield Replica(service, handler, where.get(actor.address.node_id.hex(), "-"), actor.pid, state)
