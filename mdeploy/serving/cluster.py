"""A service's handlers as replicas on a Ray cluster, for the edge that is our own process.

`connect` sends the source, has Ray Serve start replicas, and keeps what Ray tells of them in step with the backends.
HTTP, keys, limits and the queue stay with the edge: Ray carries batches, which costs less than a request by its own
proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdeploy.errors import MdeployError, UnavailableError
from mdeploy.serving import answers, cluster_node, cluster_replica, cluster_serve, cluster_source, load
from mdeploy.serving.backend import Observer
from mdeploy.serving.cluster_gcs import Head, Node
from mdeploy.serving.cluster_lanes import ClusterBackend
from mdeploy.serving.cluster_replica import Job
from mdeploy.serving.cluster_source import Parcel
from mdeploy.serving.info import HandlerInfo
from mdeploy.serving.options import AppOptions, ClusterOptions
from mdeploy.serving.process import StartError

_POLL_S, _STEADY_S = 1.0, 2.0
_LOST_AFTER_S = 15.0
"""How long the head may not answer before the service gives up, for its supervisor to begin anew."""

_PATIENCE_S = 60.0
"""How long a start waits for a head that does not answer, or does not know this machine."""

_OVERRIDES = ("max_batch_size", "max_batch_cost", "max_wait_ms", "timeout", "queue_size", "workers_per_device")

Say = Callable[[str], None]


async def connect(options: AppOptions, observer: Observer, say: Say) -> Cluster:
    """Run the handlers of a service on the cluster it names.

    Raises MdeployError for a class that cannot be used, and for a cluster that cannot be reached.
    """
    assert options.cluster is not None
    # from the supervisor, who has it from the file
    token = os.environ.get(cluster_node.TOKEN_VARIABLE) or Path(options.cluster.token_file).read_text().strip()
    os.environ.update(cluster_node.environment(token))
    cluster = Cluster(options, options.cluster, token, observer, say)
    try:
        await cluster.start()
    except BaseException as error:
        await cluster.close()
        if isinstance(error, StartError):
            raise MdeployError(str(error)) from error
        raise
    return cluster


@dataclass(frozen=True, slots=True)
class _Service:
    """One handler's application in Ray Serve: `app` is its name there, `version` changes with its code."""

    app: str
    job: Job
    info: HandlerInfo
    version: str


class Cluster:
    """The handlers of one service on a cluster. `broken` is done, with the reason, when the cluster has gone away."""

    def __init__(self, options: AppOptions, cluster: ClusterOptions, token: str, observer: Observer, say: Say) -> None:
        self._options, self._cluster, self._observer, self._say = options, cluster, observer, say
        self._head = Head(cluster.address, token)
        self._services: list[_Service] = []
        self._targets: dict[str, int] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._digest = self._id = ""
        self._is_connected = False
        self.backends: Mapping[str, ClusterBackend] = {}
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # start

    async def start(self) -> None:
        """Until every handler has a replica that answered its example. Raises StartError."""
        self._say(f"connecting to the cluster at {self._cluster.address}")
        own_ip = await self._own_ip()
        self._id = await asyncio.to_thread(self._head.cluster_id)
        with self._packed() as parcel:
            await asyncio.to_thread(self._connect, own_ip, parcel)
            _take_signals_back()
            self._services = await asyncio.to_thread(self._describe, parcel)
        await self._deploy()
        while not all(backend.lives for backend in self.backends.values()):
            await asyncio.sleep(_POLL_S)
            self._see(await asyncio.to_thread(cluster_serve.details), parcel)
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    @contextlib.contextmanager
    def _packed(self) -> Iterator[Parcel]:
        with tempfile.TemporaryDirectory(prefix="source-") as directory:
            root = Path(directory) / "parcel"
            yield cluster_source.pack(self._options.handlers, self._options.paths, root)

    def _connect(self, own_ip: str, parcel: Parcel) -> None:
        service = self._options.service
        self._is_connected = True
        cluster_serve.connect(self._cluster.address, own_ip, service, str(parcel.root), self._variables())
        cluster_serve.forward_logs(service, parcel.translate)

    async def _own_ip(self) -> str:
        """This machine's address in the cluster: a driver speaks to the Ray beside it. A head may be on its way back.

        Raises UnavailableError.
        """
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while True:
            try:
                found = await asyncio.to_thread(self._look_for_us)
                problem = UnavailableError(f"this machine is no part of the cluster {self._cluster.address}")
            except UnavailableError as error:
                found, problem = None, error
            if found:
                return found
            if asyncio.get_running_loop().time() > deadline:
                raise problem
            self._say(f"waiting for the cluster at {self._cluster.address}: {problem.message}")
            await asyncio.sleep(_STEADY_S)

    def _look_for_us(self) -> str | None:
        import psutil

        ours = {address.address for found in psutil.net_if_addrs().values() for address in found}
        return next((node.ip for node in self._head.nodes() if node.is_alive and node.ip in ours), None)

    def _variables(self) -> Mapping[str, str]:
        names = filter(None, self._cluster.variables.split(","))
        return {name: os.environ[name] for name in names if name in os.environ}

    def _describe(self, parcel: Parcel) -> list[_Service]:
        """What the handlers say of themselves, asked on the cluster: this machine may lack what they import."""
        self._digest = cluster_source.digest(parcel.root)
        listed = _asked(parcel, cluster_replica.describe, parcel.handlers, parcel.paths)
        found = [self._described(spec, parcel) for spec in listed]
        if len(found) > 1:
            return found
        (only,) = found
        return [dataclasses.replace(only, info=load.with_service(only.info, self._options.service))]

    def _described(self, spec: str, parcel: Parcel) -> _Service:
        cluster, options = self._cluster, self._options
        wished = {name: getattr(options, name) for name in _OVERRIDES}
        overrides = {name: value for name, value in wished.items() if value is not None}
        job = Job(spec, parcel.paths, overrides, options.config, cluster.model, cluster.gpus > 0)
        info: HandlerInfo = _asked(parcel, cluster_replica.information, job)
        info = dataclasses.replace(info, source=parcel.at_home(info.source))
        what = json.dumps([self._digest, dataclasses.asdict(job), self._variables()], default=str, sort_keys=True)
        version = hashlib.sha256(what.encode()).hexdigest()[:16]
        return _Service(f"{options.service}:{info.name}", job, info, version)

    # replicas

    async def _deploy(self) -> None:
        nodes = await asyncio.to_thread(self._head.nodes)
        backends = {}
        for service in self._services:
            count = self._targets[service.app] = self._target(service, nodes)
            self._say(f"starting {service.info.name} as {count} replica{'s' * (count > 1)}")
            handle = await asyncio.to_thread(self._run, service, 1)
            backends[service.info.name] = ClusterBackend(
                service.info, handle, self._observer, self._say, on_gpu=service.job.on_gpu
            )
        self.backends = backends
        prefix, ours = f"{self._options.service}:", {service.app for service in self._services}
        await asyncio.to_thread(cluster_serve.remove, lambda app: app in ours or not app.startswith(prefix))

    def _target(self, service: _Service, nodes: tuple[Node, ...]) -> int:
        """How many replicas there shall be: as wished, else as many as fit on the GPUs, or one set a machine."""
        if self._cluster.replicas is not None:
            return self._cluster.replicas
        alive = [node for node in nodes if node.is_alive]
        if service.job.on_gpu:
            return max(1, sum(int(node.gpus / self._cluster.gpus + 1e-6) for node in alive))
        return max(1, len(alive)) * service.info.workers_per_device

    def _run(self, service: _Service, generation: int) -> Any:
        cluster, info = self._cluster, service.info
        spread = cluster.replicas is None and not service.job.on_gpu
        limits: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
            "max_queued_requests": info.queue_size,
            "graceful_shutdown_timeout_s": self._options.drain_s,
        }
        if spread:  # so that a machine that joins later gets its own
            limits["max_replicas_per_node"] = info.workers_per_device
        version = f"{service.version}-{generation}"
        return cluster_serve.deploy(service.app, service.job, version, self._targets[service.app], limits)

    async def restart(self) -> None:
        """Renew all replicas, some at a time: one ends what it has before its successor starts. Raises StartError."""
        with self._packed() as parcel:
            if await asyncio.to_thread(cluster_source.digest, parcel.root) != self._digest:
                raise StartError("the source has changed: a cluster takes it at mdeploy restart --hard")
        for service in self._services:
            backend = self.backends[service.info.name]
            backend.generation += 1
            await asyncio.to_thread(self._run, service, backend.generation)
            while not backend.is_renewed(self._targets[service.app]):
                await asyncio.sleep(_POLL_S)
                self._see(await asyncio.to_thread(cluster_serve.details), parcel)

    # life

    def _see(self, details: Mapping[str, Any], starting: Parcel | None = None) -> None:
        """Hand over what Ray knows. While replicas are `starting`, one that fails raises StartError."""
        for service in self._services:
            why = cluster_serve.failure(details, service.app)
            if starting and why:
                raise StartError(starting.translate(why))
            self.backends[service.info.name].update(cluster_serve.replicas(details, service.app))

    async def _keep(self) -> None:
        """Keep in step with Ray until the end, or until the head is gone."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while not self.broken.done():
            await asyncio.sleep(_STEADY_S)
            try:
                if await asyncio.to_thread(self._head.cluster_id) != self._id:
                    self._break("its head began anew")
                    return
                self._see(await asyncio.wait_for(asyncio.to_thread(cluster_serve.details), _LOST_AFTER_S))
                await asyncio.to_thread(self._scale)
                heard = loop.time()
            except Exception as error:  # Ray's and the network's: there is no end of kinds
                if loop.time() - heard > _LOST_AFTER_S:
                    self._break(str(error) or type(error).__name__)

    def _break(self, why: str) -> None:
        """Our supervisor starts us anew; nobody is to wait for answers that cannot come."""
        reply = answers.refusal(503, "the cluster is gone, try again later", "unavailable", (("Retry-After", "30"),))
        for backend in self.backends.values():
            backend.close(reply)
        if not self.broken.done():
            self.broken.set_result(f"the cluster at {self._cluster.address} is gone: {why}")

    def _scale(self) -> None:
        """Follow the machines that came and went."""
        if self._cluster.replicas is not None:
            return
        nodes = self._head.nodes()
        for service in self._services:
            target, before = self._target(service, nodes), self._targets[service.app]
            if target != before:
                self._say(f"{service.info.name}: {target} replica{'s' * (target > 1)} instead of {before}")
                self._targets[service.app] = target
                cluster_serve.scale(service.app, target)

    async def close(self) -> None:
        """Take the replicas away and leave the cluster. A cluster that is gone has taken them itself."""
        if self._keeper:
            self._keeper.cancel()
        reply = answers.refusal(503, "the service is stopping", "unavailable")
        for backend in self.backends.values():
            backend.close(reply)
        with contextlib.suppress(Exception):  # of Ray's: there is nothing left that could be done about it
            await asyncio.wait_for(asyncio.to_thread(self._leave), _LOST_AFTER_S)

    def _leave(self) -> None:
        if not self._is_connected:
            return
        self._head.cluster_id()  # raises at once where there is no head, for which Ray would wait
        if not self.broken.done():
            prefix = f"{self._options.service}:"
            cluster_serve.remove(lambda app: not app.startswith(prefix))
        cluster_serve.leave()


def _asked(parcel: Parcel, task: Callable[..., Any], *words: Any) -> Any:
    """What a function says on the cluster; a text instead of an answer says why there is none. Raises StartError."""
    answer = cluster_serve.ask(task, *words)
    if isinstance(answer, str):
        raise StartError(parcel.translate(answer))
    return answer


def _take_signals_back() -> None:
    """Ray's core puts a handler of its own before ours, which writes a stack trace at every SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)
