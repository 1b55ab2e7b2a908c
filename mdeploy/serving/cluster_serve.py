"""The calls we make of Ray and Ray Serve, in one place: some have no public form, and all of them block.

Ray is imported here once it is needed. Nothing here knows of queues, requests or an event loop.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mdeploy.serving import cluster_replica
from mdeploy.serving.cluster_lanes import Seen
from mdeploy.serving.cluster_replica import FAILED, Job

Translate = Callable[[str], str]

_DEPLOYMENT = "handler"
_ONGOING = 3
"""Calls one replica may have: the two of its lane, and one whose end Ray has not noticed yet."""

_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
_ROUTER = "mdeploy.serving.cluster_router.ChosenReplicaRouter"


def connect(address: str, ip: str, service: str, source: str, variables: Mapping[str, str]) -> None:
    """Become a driver of the cluster, with `source` and `variables` for all that runs there for us."""
    import ray
    from ray import serve

    ray.init(
        address=address,
        _node_ip_address=ip,
        namespace=f"mdeploy-{service}",
        runtime_env={"working_dir": source, "env_vars": dict(variables)},
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config=_LOGGING)


def forward_logs(service: str, translate: Translate) -> None:
    """What replicas of this service print, on our stdout. By itself Ray shows them to whoever came first."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher
    from ray._private.worker import global_worker

    def show(data: Mapping[str, Any]) -> None:
        if str(data.get("actor_name") or "").startswith(f"ServeReplica:{service}:"):
            for line in data["lines"]:
                sys.stdout.write(f"[{data['ip']} {data['pid']}] {translate(line)}\n")
            sys.stdout.flush()

    global_worker._filter_logs_by_job = False
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("mdeploy", show)


def ask(task: Callable[..., Any], *words: Any) -> Any:
    """The answer of a function that is called somewhere on the cluster, in a process of its own."""
    import ray

    remote: Any = ray.remote(num_cpus=0, max_retries=2, max_calls=1)(task)
    return ray.get(remote.remote(*words))


def deploy(app: str, job: Job, version: str, replicas: int, limits: Mapping[str, Any]) -> Any:
    """Bring an application to what is wished, and return the handle that takes its batches.

    Replicas of the same version go on as they are; others are replaced, some at a time. `limits` are options of
    Ray Serve's deployments.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    router: Any = _ROUTER
    decorate: Any = serve.deployment(
        name=_DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=_ONGOING,
        request_router_config=RequestRouterConfig(request_router_class=router),
        max_constructor_retry_count=1,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_LOGGING,
        **limits,
    )
    deployment = decorate(cluster_replica.Replica)
    # No public option sets it: without a version of ours every start of the edge would restart all replicas.
    deployment._version = version
    target = serve.RunTarget(deployment.bind(job), name=app, route_prefix=None, external_scaler_enabled=True)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    return handle.options(method_name="run", stream=True)


def details() -> Mapping[str, Any]:
    """What Ray Serve knows of each application, down to its replicas. No public call has those."""
    found: Mapping[str, Any] = _client().get_serve_details()["applications"]
    return found


def failure(found: Mapping[str, Any], app: str) -> str:
    """Why the replicas of an application do not start; empty where they do."""
    deployment = _deployment(found, app)
    if deployment.get("status") not in ("UNHEALTHY", "DEPLOY_FAILED"):
        return ""
    lines = [line.strip() for line in deployment.get("message", "").splitlines() if line.strip()]
    own = [line.partition(FAILED)[2].strip() for line in lines if FAILED in line]
    return own[-1] if own else lines[-1] if lines else "its replicas do not start"


def replicas(found: Mapping[str, Any], app: str) -> dict[str, Seen]:
    """The replicas of an application by id."""
    return {one["replica_id"]: _seen(one) for one in _deployment(found, app).get("replicas", ())}


def _deployment(found: Mapping[str, Any], app: str) -> Mapping[str, Any]:
    deployment: Mapping[str, Any] = found.get(app, {}).get("deployments", {}).get(_DEPLOYMENT, {})
    return deployment


def _seen(replica: Mapping[str, Any]) -> Seen:
    state = getattr(replica["state"], "value", replica["state"])
    return Seen(replica["replica_id"], replica.get("node_ip") or "-", replica.get("pid") or 0, str(state))


def scale(app: str, count: int) -> None:
    """Change how many replicas an application shall have."""
    import ray
    from ray.serve._private.common import DeploymentID

    ray.get(_client()._controller.update_deployment_replicas.remote(DeploymentID(_DEPLOYMENT, app), count))


def remove(is_wanted: Callable[[str], bool]) -> None:
    """Delete every application that is not wanted."""
    from ray import serve

    for app in serve.status().applications:
        if not is_wanted(app):
            serve.delete(app, _blocking=False)


def leave() -> None:
    """Be a driver no more."""
    import ray

    ray.shutdown()


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()
