"""A compose file for services: values in, text out."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from mdeploy.export import dockerfile, yamltext
from mdeploy.export.rendered import MARK, Rendered
from mdeploy.export.workload import CACHE, USER, Key, Workload, command, environment, question

FILE = "compose.yaml"
_RESTART = {"always": "always", "on-failure": "unless-stopped", "never": "no"}
"""An engine that loses its core may end with status 0: nothing that ends unasked is a success."""


def render(works: Sequence[Workload]) -> tuple[Rendered, ...]:
    """The compose file and the Dockerfiles it builds from. Raises UsageError for services that cannot go together."""
    dockerfile.check(works)
    names = {work.name for work in works}
    document: dict[str, Any] = {
        "services": {work.name: _service(work, names) for work in works},
        "volumes": {f"{work.name}-cache": {} for work in works},
    }
    secrets = {_secret(work.name): {"file": work.key.file} for work in works if work.key}
    document |= {"secrets": secrets} if secrets else {}
    text = f"{MARK}compose`. Then: docker compose up -d --build\n{yamltext.dump(_escaped(document))}"
    files = {dockerfile.name_of(work): dockerfile.render(work, "compose") for work in works}
    return (Rendered(FILE, text), *files.values())


def _secret(name: str) -> str:
    return f"{name}.api-key"


def _service(work: Workload, names: Collection[str]) -> dict[str, Any]:
    words = command(work)
    present = [name for name in work.depends_on if name in names]
    return {
        "image": dockerfile.tag_of(work),
        "build": _build(work),
        **({"depends_on": {name: {"condition": "service_healthy"} for name in present}} if present else {}),
        "entrypoint": [words[0]],
        "command": list(words[1:]),
        "environment": environment(work),
        "ports": [{"target": work.port, "published": str(work.port), "host_ip": work.host, "protocol": "tcp"}],
        **_storage(work),
        **({"secrets": [{"source": _secret(work.name), "target": work.key.path}]} if work.key else {}),
        **_user(work.key),
        **({"deploy": {"resources": {"reservations": {"devices": [_gpus(work)]}}}} if work.gpus else {}),
        "ulimits": {"memlock": -1, "nofile": 1048576},
        "restart": _RESTART[work.restart],
        "stop_grace_period": f"{work.stop_s}s",
        "healthcheck": _healthcheck(work),
        "logging": {
            "driver": "json-file",
            "options": {"max-size": str(work.limits.log_bytes), "max-file": str(work.limits.log_files + 1)},
        },
    }


def _build(work: Workload) -> dict[str, Any]:
    found: dict[str, Any] = {"context": ".", "dockerfile": dockerfile.name_of(work)}
    contexts = dockerfile.contexts(work)
    return {**found, **({"additional_contexts": contexts} if contexts else {})}


def _storage(work: Workload) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [{"type": "volume", "source": f"{work.name}-cache", "target": CACHE}]
    for tree in work.trees:
        bind = {"create_host_path": False}
        mounts.append({"type": "bind", "source": tree.source, "target": tree.target, "read_only": True, "bind": bind})
    return {
        "volumes": mounts,
        # compilers load what they have just written
        "tmpfs": ["/tmp:mode=1777,exec"],
        "shm_size": work.shm_bytes,
        "read_only": True,
        "working_dir": "/",
        "init": True,
    }


def _user(key: Key | None) -> dict[str, Any]:
    """Docker hands a secret over as the file it is: only its owner may read it, so that is who runs."""
    uid, gid = key.owner if key else (USER, USER)
    return {"user": f"{uid}:{gid}", "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def _gpus(work: Workload) -> dict[str, Any]:
    return {"driver": "nvidia", "device_ids": [str(index) for index in work.gpus], "capabilities": ["gpu"]}


def _healthcheck(work: Workload) -> dict[str, Any]:
    probe, limits = work.probe, work.limits
    body = json.dumps(dict(probe.request_body))
    return {
        "test": ["CMD", *question(work, probe.request_path, body, limits.hang_timeout_s)],
        "interval": f"{limits.answer_interval_s:.0f}s",
        "timeout": f"{limits.hang_timeout_s + 5:.0f}s",
        "retries": 3,
        "start_period": f"{limits.start_timeout_s:.0f}s",
    }


def _escaped(value: Any) -> Any:
    """compose replaces $NAME everywhere; $$ is a dollar."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value
