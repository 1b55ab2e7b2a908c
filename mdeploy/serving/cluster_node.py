"""How Ray runs on a machine: its words and its environment, quiet, guarded by a token, and saying nothing to others.

Nothing here starts a process; whoever starts Ray or speaks to it (a node, a service on a cluster) takes these.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
"""Where Ray's processes have the token from: the environment of one user's processes, no command line."""

DEFAULT_PORT = 6379

PORTS_OF_RAY = (8265, 52365, *range(10002, 20000))
"""Ports that `ray start` gives to parts of its own; it ends where the head's is one of them."""

SERVICE = "cluster"
"""The service that is a machine's part of a cluster; no other may have its name."""

# A machine that does not answer is given up after about 6 s (Ray: 30 s), so that its requests go elsewhere.
# Metrics, events and reports nobody reads are off: idle, they are most of what Ray costs.
_QUIET: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "false",
    # Ray would kill replicas where others use the memory; the kernel is enough of a judge.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "RAY_ROTATION_MAX_BYTES": str(16 << 20),
    "RAY_ROTATION_BACKUP_COUNT": "2",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # A replica that hangs would be waited for as if it was to finish what it has.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "0.5",
    # no port: the metrics of a dashboard would be readable on every address
    "DASHBOARD_METRIC_PORT": "-1",
}


def environment(token: str) -> dict[str, str]:
    """Variables for every process that is, or speaks to, Ray."""
    return {**_QUIET, "RAY_AUTH_MODE": "token", TOKEN_VARIABLE: token, "RAY_START_HOOK": f"{__name__}.trim"}


def trim(params: Any, is_head: bool) -> None:
    """Called by `ray start` before it starts anything: no server for Ray's remote client, a port nobody needs."""
    params.ray_client_server_port = None


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """One machine of a cluster. `cpus`, `gpus` and `store_bytes` None: what the machine has.

    `address` is the head's, `ip` this machine's own; `http_port` is where the node tells how it is, on loopback.
    """

    address: str
    ip: str
    http_port: int
    is_head: bool = False
    cpus: int | None = None
    gpus: int | None = None
    store_bytes: int | None = None

    def argv(self) -> tuple[str, ...]:
        """The words after `python -m mdeploy.apps.cluster`."""
        values = {"cpus": self.cpus, "gpus": self.gpus, "store-bytes": self.store_bytes}
        return (
            f"--address={self.address}",
            f"--ip={self.ip}",
            f"--http-port={self.http_port}",
            *(("--head",) if self.is_head else ()),
            *(f"--{name}={value}" for name, value in values.items() if value is not None),
        )

    def ray_argv(self, temporary: str) -> tuple[str, ...]:
        """The command that runs Ray here until it is told to end."""
        _, _, port = self.address.rpartition(":")
        role = ("--head", f"--port={port}", "--include-dashboard=false", "--no-monitor")
        shares = {"num-cpus": self.cpus, "num-gpus": self.gpus, "object-store-memory": self.store_bytes}
        return (
            sys.executable,
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(role if self.is_head else (f"--address={self.address}",)),
            f"--node-ip-address={self.ip}",
            f"--temp-dir={temporary}",
            *(f"--{name}={value}" for name, value in shares.items() if value is not None),
        )


def parse(argv: Sequence[str]) -> NodeOptions:
    """The inverse of `NodeOptions.argv`."""
    parser = argparse.ArgumentParser(prog="python -m mdeploy.apps.cluster", allow_abbrev=False)
    parser.add_argument("--address", required=True)
    parser.add_argument("--ip", required=True)
    parser.add_argument("--http-port", type=int, required=True)
    parser.add_argument("--head", dest="is_head", action="store_true")
    for name in ("--cpus", "--gpus", "--store-bytes"):
        parser.add_argument(name, type=int)
    return NodeOptions(**vars(parser.parse_args(list(argv))))


def take_token() -> str:
    """The token the supervisor handed over. Raises KeyError where it did not."""
    return os.environ[TOKEN_VARIABLE]
