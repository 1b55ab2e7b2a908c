"""A service's handlers as replicas on a Ray cluster, for the edge that is our own process.

`connect` sends the source, has Ray Serve start replicas, and keeps what Ray tells of them in step with the backends.
HTTP, keys, limits and the queue stay with the edge: Ray carries batches, which costs less than a request by its own
proxy. Ray is imported here only once it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdeploy.errors import MdeployError
from mdeploy.serving import cluster_node, cluster_replica, cluster_source, load
from mdeploy.serving.backend import Observer
from mdeploy.serving.cluster_gcs import Head, Node
from mdeploy.serving.cluster_lanes import ClusterBackend, Seen
from mdeploy.serving.cluster_replica import FAILED, Job
from mdeploy.serving.cluster_source import Parcel
from mdeploy.serving.info import HandlerInfo
from mdeploy.serving.options import AppOptions, ClusterOptions
from mdeploy.serving.process import StartError

_POLL_S = 1.0
_LOST_AFTER_S = 20.0
"""How long the head may not answer before the service gives up, for its supervisor to begin anew."""

_DEPLOYMENT = "handler"
_ONGOING = 3
"""Calls one replica may have: the two of its lane, and one whose end Ray has not noticed yet."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Service:
    """One handler's application in Ray Serve: `app` is its name there, `version` changes with its code."""

    app: str
    job: Job
    info: HandlerInfo
    version: str


class Cluster:
    """The handlers of one service on a cluster."""

    def __init__(self, options: AppOptions, cluster: ClusterOptions, token: str, observer: Observer, say: Say) -> None:
        self._options, self._cluster, self._observer, self._say = options, cluster, observer, say
        self._head = Head(cluster.address, token)
        self._services: list[_Service] = []
        self._backends: dict[str, ClusterBackend] = {}
        self._targets: dict[str, int] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._digest = ""
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, when the cluster has gone away."""

    @property
    def backends(self) -> Mapping[str, ClusterBackend]:
        """Backends by the names of their handlers."""
        return self._backends

    @property
    def generation(self) -> int:
        """How often all replicas were renewed, and once more."""
        return max((backend.generation for backend in self._backends.values()), default=1)

    # start

    async def start(self) -> None:
        """Until every handler has a replica that answered its example. Raises StartError."""
        self._say(f"connecting to the cluster at {self._cluster.address}")
        with tempfile.TemporaryDirectory(prefix="source-") as directory:
            options = self._options
            parcel = cluster_source.pack(options.handlers, options.paths, Path(directory) / "parcel")
            await asyncio.to_thread(self._connect, parcel)
            _take_signals_back()
            self._services = await asyncio.to_thread(self._describe, parcel)
        await self._deploy()
        while not all(backend.lives for backend in self._backends.values()):
            await asyncio.sleep(_POLL_S)
            self._see(await asyncio.to_thread(_details), starting=True)
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def _connect(self, parcel: Parcel) -> None:
        """Become a driver of the cluster. Ray's own log is for Ray's people: warnings are enough here."""
        import ray
        from ray import serve

        ray.init(
            address=self._cluster.address,
            _node_ip_address=self._own_ip(),
            namespace=f"mdeploy-{self._options.service}",
            runtime_env={"working_dir": str(parcel.root), "env_vars": dict(self._variables())},
            logging_level=logging.ERROR,
        )
        _forward_logs(self._options.service)
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def _own_ip(self) -> str:
        """This machine's address in the cluster: a driver speaks to the Ray beside it. Raises StartError."""
        import psutil

        ours = {address.address for found in psutil.net_if_addrs().values() for address in found}
        here = next((node.ip for node in self._head.nodes() if node.is_alive and node.ip in ours), None)
        if here is None:
            raise StartError("this machine is no part of the cluster any more: mdeploy cluster status")
        return here

    def _describe(self, parcel: Parcel) -> list[_Service]:
        """What the handlers say of themselves, asked on the cluster: this machine may lack what they import."""
        listed = _ask(cluster_replica.describe, parcel.handlers, parcel.paths)
        self._digest = _digest(parcel.root)
        found = [self._described(spec, parcel) for spec in listed]
        return [self._named_alone(service) for service in found] if len(found) == 1 else found

    def _named_alone(self, service: _Service) -> _Service:
        return dataclasses.replace(service, info=load.with_service(service.info, self._options.service))

    def _described(self, spec: str, parcel: Parcel) -> _Service:
        on_gpu = self._cluster.gpus > 0
        job = Job(spec, parcel.paths, self._overrides(), self._options.config, self._cluster.model, on_gpu)
        info: HandlerInfo = _ask(cluster_replica.information, job)
        info = dataclasses.replace(info, source=parcel.at_home(info.source))
        what = json.dumps([self._digest, dataclasses.asdict(job), list(self._variables())], default=str)
        version = hashlib.sha256(what.encode()).hexdigest()[:16]
        return _Service(f"{self._options.service}:{info.name}", job, info, version)

    def _variables(self) -> Mapping[str, str]:
        names = filter(None, self._cluster.variables.split(","))
        return {name: os.environ[name] for name in names if name in os.environ}

    def _overrides(self) -> dict[str, Any]:
        wished = {name: getattr(self._options, name) for name in _OVERRIDES}
        return {name: value for name, value in wished.items() if value is not None}

    # replicas

    async def _deploy(self) -> None:
        nodes = await asyncio.to_thread(self._head.nodes)
        for service in self._services:
            self._targets[service.app] = self._target(service, nodes)
            self._say(f"starting {self._targets[service.app]} replicas of {service.info.name}")
            handle = await asyncio.to_thread(self._run, service, 1)
            backend = ClusterBackend(service.info, handle, self._observer, service.job.on_gpu)
            self._backends[service.info.name] = backend
        await asyncio.to_thread(self._remove_others)

    def _target(self, service: _Service, nodes: tuple[Node, ...]) -> int:
        """How many replicas there shall be: as wished, else as many as fit on the GPUs, or one set a machine."""
        if self._cluster.replicas is not None:
            return self._cluster.replicas
        alive = [node for node in nodes if node.is_alive]
        if service.job.on_gpu:
            return max(1, sum(int(node.gpus / self._cluster.gpus + 1e-6) for node in alive))
        return max(1, len(alive)) * service.info.workers_per_device

    def _run(self, service: _Service, generation: int) -> Any:
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        cluster, info = self._cluster, service.info
        deployment = serve.deployment(
            cluster_replica.Replica,
            name=_DEPLOYMENT,
            num_replicas=self._targets[service.app],
            ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
            max_replicas_per_node=self._most_on_a_node(service),
            max_ongoing_requests=_ONGOING,
            max_queued_requests=info.queue_size,
            request_router_config=RequestRouterConfig(
                request_router_class="mdeploy.serving.cluster_router.ChosenReplicaRouter"
            ),
            max_constructor_retry_count=1,
            health_check_period_s=2,
            health_check_timeout_s=10,
            graceful_shutdown_timeout_s=self._options.drain_s,
            graceful_shutdown_wait_loop_s=0.5,
            logging_config=_LOGGING,
        )
        # No public option sets it: without a version of ours every start of the edge would restart all replicas.
        deployment._version = f"{service.version}-{generation}"
        target = serve.RunTarget(
            deployment.bind(service.job), name=service.app, route_prefix=None, external_scaler_enabled=True
        )
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        return handle.options(method_name="run", stream=True)

    def _most_on_a_node(self, service: _Service) -> int | None:
        """One set a machine, so that a machine that joins later gets its own."""
        spread = self._cluster.replicas is None and not service.job.on_gpu
        return service.info.workers_per_device if spread else None

    def _remove_others(self) -> None:
        """Handlers that an earlier version of the service had."""
        from ray import serve

        ours = {service.app for service in self._services}
        prefix = f"{self._options.service}:"
        for app in serve.status().applications:
            if app.startswith(prefix) and app not in ours:
                serve.delete(app, _blocking=False)

    async def restart(self) -> None:
        """Renew all replicas, some at a time: one ends what it has before its successor starts. Raises StartError."""
        if await asyncio.to_thread(self._has_changed):
            raise StartError("the source has changed: a cluster takes it at mdeploy restart --hard")
        for service in self._services:
            backend = self._backends[service.info.name]
            backend.generation += 1
            await asyncio.to_thread(self._run, service, backend.generation)
            while not backend.is_renewed(self._targets[service.app]):
                await asyncio.sleep(_POLL_S)
                self._see(await asyncio.to_thread(_details), starting=True)

    def _has_changed(self) -> bool:
        with tempfile.TemporaryDirectory(prefix="source-") as directory:
            options = self._options
            parcel = cluster_source.pack(options.handlers, options.paths, Path(directory) / "parcel")
            return _digest(parcel.root) != self._digest

    # life

    async def _keep(self) -> None:
        """Keep in step with Ray until the end, or until the head is gone."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while not self.broken.done():
            await asyncio.sleep(_POLL_S)
            try:
                details = await asyncio.wait_for(asyncio.to_thread(_details), _LOST_AFTER_S)
                self._see(details, starting=False)
                await asyncio.wait_for(asyncio.to_thread(self._scale), _LOST_AFTER_S)
                heard = loop.time()
            except Exception as error:  # Ray's and the network's: there is no end of kinds
                if loop.time() - heard > _LOST_AFTER_S and not self.broken.done():
                    why = str(error) or type(error).__name__
                    self.broken.set_result(f"the cluster at {self._cluster.address} is gone: {why}")

    def _see(self, details: Mapping[str, Any], *, starting: bool) -> None:
        """Hand over what Ray knows. While `starting`, a deployment that failed raises StartError."""
        for service in self._services:
            found = details.get(service.app, {}).get("deployments", {}).get(_DEPLOYMENT, {})
            if starting and found.get("status") in ("UNHEALTHY", "DEPLOY_FAILED"):
                raise StartError(_reason(found.get("message", "")))
            replicas = [_seen(replica) for replica in found.get("replicas", ())]
            self._backends[service.info.name].update({one.id: one for one in replicas})

    def _scale(self) -> None:
        """Follow the machines that came and went."""
        if self._cluster.replicas is not None:
            return
        nodes = self._head.nodes()
        for service in self._services:
            target = self._target(service, nodes)
            if target != self._targets[service.app]:
                self._say(f"{target} replicas of {service.info.name} instead of {self._targets[service.app]}")
                self._targets[service.app] = target
                _set_replicas(service.app, target)

    async def close(self) -> None:
        """Take the replicas away and leave the cluster. A cluster that is gone has taken them itself."""
        if self._keeper:
            self._keeper.cancel()
        for backend in self._backends.values():
            backend.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.to_thread(self._leave), _LOST_AFTER_S)

    def _leave(self) -> None:
        import ray
        from ray import serve

        for service in self._services:
            serve.delete(service.app, _blocking=False)
        ray.shutdown()


_OVERRIDES = ("max_batch_size", "max_batch_cost", "max_wait_ms", "timeout", "queue_size", "workers_per_device")
_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


async def connect(options: AppOptions, observer: Observer, say: Say) -> Cluster:
    """Run the handlers of a service on the cluster it names.

    Raises MdeployError for a class that cannot be used, and for a cluster that cannot be reached.
    """
    assert options.cluster is not None
    token = _token(options.cluster)
    os.environ.update(cluster_node.environment(token))
    cluster = Cluster(options, options.cluster, token, observer, say)
    await asyncio.to_thread(cluster._head.versions)
    try:
        await cluster.start()
    except BaseException as error:
        await cluster.close()
        if isinstance(error, StartError):
            raise MdeployError(str(error)) from error
        raise
    return cluster


def _take_signals_back() -> None:
    """Ray's core puts a handler of its own before ours, which writes a stack trace at every SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)


def _token(cluster: ClusterOptions) -> str:
    """From the environment the supervisor made, else from its file. Raises OSError."""
    return os.environ.get(cluster_node.TOKEN_VARIABLE) or Path(cluster.token_file).read_text().strip()


def _ask(task: Any, *words: Any) -> Any:
    """The answer of a task on the cluster; a text instead of it says why there is none. Raises StartError."""
    import ray

    remote = ray.remote(num_cpus=0, max_retries=2, max_calls=1)(task)
    answer = ray.get(remote.remote(*words))
    if isinstance(answer, str):
        raise StartError(answer)
    return answer


def _digest(root: Path) -> str:
    """What tells two versions of the source apart."""
    found = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file():
            found.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def _details() -> Mapping[str, Any]:
    """Applications of Ray Serve by name, down to each replica. No public call has the replicas."""
    from ray.serve.context import _get_global_client

    found: Mapping[str, Any] = _get_global_client().get_serve_details()["applications"]
    return found


def _seen(replica: Mapping[str, Any]) -> Seen:
    state = getattr(replica["state"], "value", replica["state"])
    return Seen(replica["replica_id"], replica.get("node_ip") or "-", replica.get("pid") or 0, str(state))


def _set_replicas(app: str, count: int) -> None:
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    controller = _get_global_client()._controller
    ray.get(controller.update_deployment_replicas.remote(DeploymentID(_DEPLOYMENT, app), count))


def _reason(message: str) -> str:
    """Why replicas do not start: what ours said, else the last line of Ray's."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    own = [line.partition(FAILED)[2].strip() for line in lines if FAILED in line]
    return own[-1] if own else lines[-1] if lines else "the replicas do not start"


def _forward_logs(service: str) -> None:
    """What replicas of this service print, on our stdout. By itself Ray shows them to whoever came first."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher
    from ray._private.worker import global_worker

    def show(data: Mapping[str, Any]) -> None:
        if str(data.get("actor_name") or "").startswith(f"ServeReplica:{service}:"):
            for line in data["lines"]:
                sys.stdout.write(f"[{data['ip']} {data['pid']}] {line}\n")
            sys.stdout.flush()

    global_worker._filter_logs_by_job = False
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("mdeploy", show)
