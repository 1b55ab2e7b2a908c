"""Manifests and Dockerfiles, judged by those who know: the schemas of compose and Kubernetes, and hadolint."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mdeploy.errors import UsageError
from mdeploy.export import compose, dockerfile, kubernetes, yamltext
from mdeploy.export.kubernetes import Target
from mdeploy.export.workload import Tree, Workload, listening, moved, places
from tests.export import cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kubernetes_validate

_SCHEMAS = "check_jsonschema.builtin_schemas.vendor"
_TARGETS = (Target(), Target("ml", "registry.example.org/app@sha256:abc", 3, "models"))


def _compose(*works: Workload) -> Any:
    return yaml.safe_load(str(compose.render(works)[0].content))


def _documents(work: Workload, target: Target = _TARGETS[0]) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(str(kubernetes.render([work], target)[0].content)))


def _pod(work: Workload, target: Target = _TARGETS[0]) -> Any:
    return _documents(work, target)[0]["spec"]["template"]["spec"]


def test_compose_files_follow_the_specification() -> None:
    schema = json.loads(importlib.resources.files(_SCHEMAS).joinpath("compose-spec.json").read_text())
    for works in (cases.ALL, *((work,) for work in cases.ALL)):
        jsonschema.validate(_compose(*works), schema)


@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("work", cases.ALL, ids=lambda work: work.name)
def test_manifests_follow_the_schemas_of_kubernetes(work: Workload, target: Target) -> None:
    documents = _documents(work, target)
    kinds = ["Deployment", "Service", *(["PodDisruptionBudget"] if target.replicas > 1 else [])]
    assert [document["kind"] for document in documents] == kinds
    for document in documents:
        for version in ("1.27", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("work", cases.ALL, ids=lambda work: work.name)
def test_dockerfiles_please_hadolint(work: Workload, tmp_path: Path) -> None:
    file = dockerfile.render(work, "compose")
    (tmp_path / file.name).write_text(str(file.content))
    command = [Path(sys.executable).parent / "hadolint", tmp_path / file.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def _expanded(text: str) -> str:
    """What Kubernetes makes of a word where HOME is set: $$ is a dollar, $(NAME) a value, any other $ itself."""
    return re.sub(r"\$\$|\$\(HOME\)", lambda found: "$" if found[0] == "$$" else "/cache", text)


@pytest.mark.parametrize("word", ["$(HOME)", "$$(HOME)", "$$", "a$", "$$$(HOME)$", "$@"])
def test_dollars_survive_kubernetes(word: str) -> None:
    args = _pod(dataclasses.replace(cases.OPEN_APP, words=("python3", word)))["containers"][0]["args"]
    assert _expanded(args[-1]) == word


def test_words_reach_the_container_as_they_are() -> None:
    big = _compose(*cases.ALL)["services"][cases.GPU.name]
    undone = [word.replace("$$", "$") for word in big["command"]]
    assert undone[-1] == cases.ODD
    assert big["environment"]["ODD"].replace("$$", "$") == cases.ODD
    container = _pod(cases.GPU)["containers"][0]
    assert _expanded(container["args"][-1]) == cases.ODD
    assert all(isinstance(word, str) for word in [*undone, *container["args"]])


@pytest.mark.parametrize(
    "text", ["yes", "1e3", "0x1f", "0o17", "", "~", "a: b", "- a", "12:30", "=", "null", cases.ODD]
)
def test_yaml_keeps_text_text(text: str) -> None:
    written = yamltext.dump({"value": [text], text: 1})
    assert yaml.safe_load(written) == {"value": [text], text: 1}
    assert '- "' in written


def test_gpus_are_the_hosts_outside_and_counted_from_0_inside() -> None:
    big = _compose(cases.GPU)["services"][cases.GPU.name]
    device = big["deploy"]["resources"]["reservations"]["devices"][0]
    assert device == {"driver": "nvidia", "device_ids": ["2", "3"], "capabilities": ["gpu"]}
    assert not [name for name in big["environment"] if name.startswith("CUDA_")]
    assert _pod(cases.GPU)["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}


def test_keys_are_referred_to() -> None:
    document = _compose(*cases.ALL)
    assert document["secrets"]["caption.api-key"] == {"file": "/home/a/secrets/caption.api-key"}
    caption, echo = document["services"]["caption"], document["services"]["echo"]
    assert (caption["user"], echo["user"]) == ("1000:1000", "10001:10001")
    assert caption["environment"]["MDEPLOY_API_KEYS_FILE"] == "/run/secrets/caption.api-key"
    secret = next(volume["secret"] for volume in _pod(cases.APP)["volumes"] if volume["name"] == "key")
    assert (secret["secretName"], secret["items"][0]["key"]) == ("caption-api-key", "api-key")


def test_what_is_asked_to_know_that_it_works() -> None:
    open_app, closed = (_pod(work)["containers"][0] for work in (cases.OPEN_APP, cases.APP))
    assert open_app["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert closed["readinessProbe"]["exec"]["command"][-1] == "/run/secrets/caption.api-key"
    assert closed["livenessProbe"]["httpGet"]["path"] == "/health"
    llm = _pod(cases.GPU)["containers"][0]
    assert llm["startupProbe"]["failureThreshold"] == 360
    assert "/v1/completions" in " ".join(llm["startupProbe"]["exec"]["command"])
    assert _pod(cases.GPU)["terminationGracePeriodSeconds"] > 120


def test_dependencies_are_those_that_are_there() -> None:
    assert _compose(*cases.ALL)["services"][cases.GPU.name]["depends_on"] == {"chat": {"condition": "service_healthy"}}
    assert "depends_on" not in _compose(cases.GPU)["services"][cases.GPU.name]


@pytest.mark.parametrize(
    ("name", "label"), [("Big.v1_a", "big-v1-a"), ("7b", "mdeploy-7b"), ("a" * 63, "a" * 63), ("9" * 63, None)]
)
def test_names_of_kubernetes(name: str, label: str | None) -> None:
    found = kubernetes.name_of(dataclasses.replace(cases.CPU, name=name))
    assert len(found) <= 63
    assert label in (None, found)


@pytest.mark.parametrize(
    "target", [Target(namespace="Upper"), Target(claim="a_b"), Target(image="a b"), Target(namespace="-x")]
)
def test_names_a_cluster_would_refuse(target: Target) -> None:
    with pytest.raises(UsageError):
        kubernetes.render([cases.CPU], target)


def test_two_services_of_one_name() -> None:
    twin = dataclasses.replace(cases.GPU, name="big-v1-a")
    with pytest.raises(UsageError, match="both big-v1-a"):
        kubernetes.render([cases.GPU, twin], Target())


def test_two_versions_of_an_engine_are_two_images() -> None:
    newer = dataclasses.replace(cases.GPU, name="newer", version="0.33.0")
    found = {file.name: str(file.content) for file in compose.render([cases.GPU, newer])}
    assert f"v{cases.GPU.version}" in found[f"vllm-cuda-{cases.GPU.version}.Dockerfile"]
    assert "v0.33.0" in found["vllm-cuda-0.33.0.Dockerfile"]


@pytest.mark.parametrize("names", [("echo", "Echo"), ("a.b", "a-b")])
def test_two_apps_that_would_be_one_image_are_refused(names: tuple[str, str]) -> None:
    works = [dataclasses.replace(cases.OPEN_APP, name=name) for name in names]
    with pytest.raises(UsageError, match="would both be mdeploy/"):
        compose.render(works)


@pytest.mark.parametrize("name", ["a..b", "a._b", "x___y", "Upper-", "7b"])
def test_tags_are_those_of_docker(name: str) -> None:
    tag = dockerfile.tag_of(dataclasses.replace(cases.OPEN_APP, name=name))
    assert re.fullmatch(r"mdeploy/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*:[0-9.]+", tag)


def test_a_claim_that_would_mix_models_up_is_refused() -> None:
    other = dataclasses.replace(cases.OPEN_APP, trees=(Tree("/other/m", "/other/m", "/models/m"),))
    with pytest.raises(UsageError, match="/srv/models/m and /other/m would both be m in the volume"):
        kubernetes.render([cases.CPU, other], Target(claim="models"))
    kubernetes.render([cases.CPU, other], Target())


def test_paths_move_whole_and_only_where_they_are_meant() -> None:
    trees = places([("/srv/m", "/real/m"), ("/srv/m/x.jinja", "/real/m/x.jinja"), ("/other/m", "/other/m")], "/srv/m")
    assert trees == (Tree("/other/m", "/other/m", "/data/m"), Tree("/srv/m", "/real/m", "/models/m"))
    texts = [
        "/srv/m",
        "--path=/srv/m",
        "a=/srv/m/x.jinja",
        "/srv/m/a.py:Class",
        "/srv/mm",
        "/x/srv/m",
        "/other/m,/srv/m",
    ]
    assert [moved(text, trees) for text in texts] == [
        "/models/m",
        "--path=/models/m",
        "a=/models/m/x.jinja",
        "/models/m/a.py:Class",
        "/srv/mm",
        "/x/srv/m",
        "/data/m,/models/m",
    ]
    twins = places([("/a/m", "/a/m"), ("/b/m", "/b/m")], "/a/m")
    assert {tree.target for tree in twins} == {"/models/m", "/data/m"}
    assert listening(["--host", "::1", "--host=x"]) == ("--host", "0.0.0.0", "--host=0.0.0.0")
