"""Manifests for Kubernetes: values in, YAML out. A secret is referred to by name, its value is in no manifest."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mdeploy.errors import UsageError
from mdeploy.export import dockerfile, yamltext
from mdeploy.export.rendered import MARK, Rendered
from mdeploy.export.workload import CACHE, SECRETS, USER, Workload, command, environment, question

_LABEL = "app.kubernetes.io/"
_UNROUTED_S = 5
"""What the end of a pod waits for its address to leave every node's routes."""


@dataclass(frozen=True, slots=True)
class Target:
    """How a workload runs in a cluster. `claim` names a volume claim with the models, None the node's disk."""

    namespace: str | None = None
    image: str | None = None
    replicas: int = 1
    claim: str | None = None


def render(works: Sequence[Workload], target: Target) -> tuple[Rendered, ...]:
    """One file of manifests a service, and the Dockerfiles of images that nobody publishes."""
    check(works, target)
    files = {f"{work.name}.yaml": Rendered(f"{work.name}.yaml", _text(work, target)) for work in works}
    for work in works:
        if not target.image and work.image != "vllm-cuda":
            files[dockerfile.name_of(work)] = dockerfile.render(work, "kubernetes")
    return tuple(files.values())


def check(works: Sequence[Workload], target: Target) -> None:
    """Raises UsageError for what a cluster would refuse or mix up."""
    names: dict[str, str] = {}
    for work in works:
        other = names.setdefault(name_of(work), work.name)
        if other != work.name:
            hint = "export one of them into another --namespace"
            raise UsageError(f"{other} and {work.name} are both {name_of(work)} in Kubernetes", hint=hint)
    if not target.image:
        dockerfile.check(works)
    if target.claim:
        _check_claim(works)
    for flag, value in (("--namespace", target.namespace), ("--claim", target.claim)):
        if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
            raise UsageError(f"{flag} {value}: no name of Kubernetes", hint="lower-case letters, digits and -")
    if target.image and not re.fullmatch(r"[a-z0-9][A-Za-z0-9._:/@-]*", target.image):
        raise UsageError(f"--image {target.image}: no name of an image", hint="--image registry.example.org/app:1.0")


def _check_claim(works: Sequence[Workload]) -> None:
    """One name in a volume cannot be two directories. Raises UsageError."""
    held: dict[str, str] = {}
    for source, name in (place for work in works for place in in_claim(work)):
        other = held.setdefault(name, source)
        if other != source:
            hint = "rename one of the directories, or export their services with claims of their own"
            raise UsageError(f"{other} and {source} would both be {name} in the volume of --claim", hint=hint)


def name_of(work: Workload) -> str:
    """The service's name as a label of DNS: lower case, begins with a letter, at most 63 (RFC 1035)."""
    plain = re.sub(r"[^a-z0-9]+", "-", work.name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"mdeploy-{plain}")[:63].rstrip("-")


def secret_of(work: Workload) -> str:
    """The Secret that must hold the key, as `api-key`."""
    return f"{name_of(work)[:55]}-api-key"


def _text(work: Workload, target: Target) -> str:
    head = [f"{MARK}kubernetes {work.name}`."]
    if work.key:
        head += ["# Its key comes from a Secret, made once:", f"#   {secret_command(work, target)}"]
    if not target.image and work.image != "vllm-cuda":
        contexts = "".join(
            f" --build-context {name}={shlex.quote(path)}" for name, path in dockerfile.contexts(work).items()
        )
        build = f"docker build -f {dockerfile.name_of(work)} -t {dockerfile.tag_of(work)}{contexts} ."
        head += ["# Its image is built here, and has to be where the nodes find it:", f"#   {build}"]
    documents = [*_documents(work, target)]
    return "\n".join(head) + "\n" + "".join(f"---\n{yamltext.dump(document)}" for document in documents)


def secret_command(work: Workload, target: Target) -> str:
    """What makes the Secret from the key file of this machine."""
    space = f" -n {target.namespace}" if target.namespace else ""
    source = shlex.quote(f"--from-file=api-key={work.key.file if work.key else ''}")
    return f"kubectl create secret generic {secret_of(work)}{space} {source}"


def _documents(work: Workload, target: Target) -> Iterator[dict[str, Any]]:
    yield _deployment(work, target)
    ports = [{"name": "http", "port": work.port, "targetPort": "http", "protocol": "TCP"}]
    yield _object("v1", "Service", work, target, {"type": "ClusterIP", "selector": _selector(work), "ports": ports})
    if target.replicas > 1:
        spec = {"maxUnavailable": 1, "selector": {"matchLabels": _selector(work)}}
        yield _object("policy/v1", "PodDisruptionBudget", work, target, spec)


def _object(api: str, kind: str, work: Workload, target: Target, spec: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name_of(work), "labels": _labels(work)}
    if target.namespace:
        metadata["namespace"] = target.namespace
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


def _selector(work: Workload) -> dict[str, str]:
    return {f"{_LABEL}name": name_of(work)}


def _labels(work: Workload) -> dict[str, str]:
    return {**_selector(work), f"{_LABEL}component": work.kind, f"{_LABEL}managed-by": "mdeploy"}


def _deployment(work: Workload, target: Target) -> dict[str, Any]:
    # a second pod beside the first would need GPUs that nobody has
    surge = {"maxSurge": 0, "maxUnavailable": 1} if work.gpus else {"maxSurge": 1, "maxUnavailable": 0}
    spec = {
        "replicas": target.replicas,
        "progressDeadlineSeconds": int(work.limits.start_timeout_s) + 600,
        "selector": {"matchLabels": _selector(work)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": surge},
        "template": {"metadata": {"labels": _labels(work)}, "spec": _pod(work, target)},
    }
    return _object("apps/v1", "Deployment", work, target, spec)


def _pod(work: Workload, target: Target) -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": work.stop_s + _UNROUTED_S,
        "automountServiceAccountToken": False,
        # a Service called vllm would set VLLM_PORT in every pod beside it, which vLLM reads
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(work, target)],
        "volumes": [*_volumes(work, target)],
    }


def _container(work: Workload, target: Target) -> dict[str, Any]:
    words = [_literal(word) for word in command(work)]
    published = f"{dockerfile.VLLM_IMAGE}:v{work.version}" if work.image == "vllm-cuda" else dockerfile.tag_of(work)
    return {
        "name": work.kind,
        "image": target.image or published,
        "command": words[:1],
        "args": words[1:],
        "workingDir": "/",
        "env": [{"name": name, "value": _literal(value)} for name, value in environment(work).items()],
        "ports": [{"name": "http", "containerPort": work.port, "protocol": "TCP"}],
        **_probes(work),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_UNROUTED_S)]}}},
        "resources": _resources(work),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*_mounts(work, target)],
    }


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in words and values, not in probes; $$ is a dollar."""
    return text.replace("$", "$$")


def _resources(work: Workload) -> dict[str, Any]:
    found: dict[str, Any] = {"requests": {"cpu": str(work.cores)}} if work.cores else {}
    return {**found, **({"limits": {"nvidia.com/gpu": len(work.gpus)}} if work.gpus else {})}


def _probes(work: Workload) -> dict[str, Any]:
    """Started once it has really answered. Alive by its cheap path: a long queue must not get it killed."""
    probe, limits = work.probe, work.limits
    health = {"httpGet": {"path": probe.health_path, "port": "http"}, "timeoutSeconds": int(limits.health_timeout_s)}
    answer = _answers(work)
    # workers of an app that died are replaced by the app itself, which says 503 meanwhile
    patience = 3 if work.kind == "llm" else 30
    return {
        "startupProbe": {**answer, "periodSeconds": 10, "failureThreshold": math.ceil(limits.start_timeout_s / 10)},
        "readinessProbe": {**(health if work.kind == "llm" else answer), "periodSeconds": 10, "failureThreshold": 2},
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": patience},
    }


def _answers(work: Workload) -> dict[str, Any]:
    probe = work.probe
    seconds = int(probe.timeout_s)
    if not probe.request_body and work.key is None:
        return {"httpGet": {"path": probe.request_path, "port": "http"}, "timeoutSeconds": seconds}
    words = question(work, probe.request_path, json.dumps(dict(probe.request_body)), seconds - 1)
    return {"exec": {"command": list(words)}, "timeoutSeconds": seconds}


def _volumes(work: Workload, target: Target) -> Iterator[dict[str, Any]]:
    yield {"name": "cache", "emptyDir": {}}
    yield {"name": "tmp", "emptyDir": {}}
    yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(work.shm_bytes)}}
    if work.key:
        item = {"key": "api-key", "path": work.key.path.removeprefix(f"{SECRETS}/")}
        yield {"name": "key", "secret": {"secretName": secret_of(work), "defaultMode": 0o440, "items": [item]}}
    if target.claim and work.trees:
        yield {"name": "models", "persistentVolumeClaim": {"claimName": target.claim, "readOnly": True}}
        return
    for number, tree in enumerate(work.trees):
        yield {"name": f"data-{number}", "hostPath": {"path": tree.source}}


def _mounts(work: Workload, target: Target) -> Iterator[dict[str, Any]]:
    yield {"name": "cache", "mountPath": CACHE}
    yield {"name": "tmp", "mountPath": "/tmp"}
    yield {"name": "shm", "mountPath": "/dev/shm"}
    if work.key:
        yield {"name": "key", "mountPath": SECRETS, "readOnly": True}
    for number, tree in enumerate(work.trees):
        place = {"mountPath": tree.target, "readOnly": True}
        if target.claim:
            yield {"name": "models", **place, "subPath": tree.target.rsplit("/", 1)[1]}
        else:
            yield {"name": f"data-{number}", **place}


def in_claim(work: Workload) -> tuple[tuple[str, str], ...]:
    """What the volume of a claim has to hold: directory of this machine, and name in the volume."""
    return tuple((tree.source, tree.target.rsplit("/", 1)[1]) for tree in work.trees)


def one_stream(files: Sequence[Rendered]) -> str:
    """All manifests as one stream, for `kubectl apply -f -`."""
    return "".join(str(file.content) for file in files if file.name.endswith(".yaml"))
