"""`serve app` and `init app`: what they understand, refuse, render and serve."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mdeploy.serving.options import AppOptions, parse
from tests.support import free_port, mdeploy, ps, running, until

APP = """\
from mdeploy import Handler


class Echo(Handler):
    example = {"n": 1}
    max_batch_size = 8

    def forward(self, batch):
        return batch


class Upper(Handler):
    example = {"text": "a"}

    def inference(self, request):
        return request.json()["text"].upper()
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    directory = tmp_path / "cats"
    directory.mkdir()
    (directory / "app.py").write_text(APP)
    return directory / "app.py"


def _dry(*words: str | Path) -> tuple[dict[str, Any], AppOptions]:
    result = mdeploy("serve", "app", *words, "--dry-run", "--json")
    assert result.code == 0, result.stderr
    service = result.json["service"]
    return service, parse(service["argv"][4:])


def _port() -> tuple[str, str]:
    return "--port", str(free_port())


def _post(url: str, body: object, key: str = "") -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


# what is rendered


def test_a_file_and_what_stands_for_it(app: Path) -> None:
    service, options = _dry(app)
    assert service["argv"][1:4] == ["-m", "mdeploy.apps", "app"]
    assert (service["name"], service["kind"], service["model"], service["reloads"]) == ("cats", "app", "app.py", True)
    assert service["probe"]["request_path"] == "/ready"
    assert service["probe"]["work_metrics"] == ["mdeploy_inference_total"]
    assert (options.handlers, options.paths, options.devices) == ((str(app),), (str(app.parent),), ("cpu",))
    assert f"--path={app.parent}" in service["argv"]


def test_options_reach_the_app(app: Path, tmp_path: Path) -> None:
    words = ["--batch", "4", "--batch-cost", "9.5", "--max-wait-ms", "2", "--timeout", "7", "--queue", "11"]
    words += ["--workers-per-gpu", "3", "--max-body", "2MiB", "--cors", "https://a.b", "--cors", "*", "--drain", "5"]
    words += ["--reload", "--env", "A=b=c", "--path", str(tmp_path), "--name", "n", "--restart", "never"]
    service, options = _dry(f"{app}:Echo", f"{app}:Upper", *words)
    assert (options.max_batch_size, options.max_batch_cost, options.max_wait_ms) == (4, 9.5, 2.0)
    assert (options.timeout, options.queue_size, options.workers_per_device) == (7.0, 11, 3)
    assert (options.max_body_bytes, options.cors, options.drain_s) == (2 << 20, ("https://a.b", "*"), 4.5)
    assert (options.reload, options.service, service["env"]["A"]) == (True, "n", "b=c")
    assert options.paths == (str(tmp_path), str(app.parent))
    assert options.handlers == (f"{app}:Echo", f"{app}:Upper")
    assert service["restart"] == "never"


def test_a_module_where_we_are(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mod.py").write_text(APP)
    _, options = _dry("pkg.mod:Echo")
    assert (options.handlers, options.paths) == (("pkg.mod:Echo",), (str(tmp_path),))


def test_a_model_is_downloaded_elsewhere_and_named_to_the_workers(app: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    service, _ = _dry(app, "--model", "./weights")
    assert service["env"]["MDEPLOY_MODEL_DIR"] == str(tmp_path / "weights")
    assert service["model"] == "weights"


def test_an_interpreter_by_its_environment(app: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    _, options = _dry(app, "--python", "env")
    assert options.python == str(tmp_path / "env/bin/python")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], ("1",)),
        (["--gpus", "0,2"], ("0", "2")),
        (["--gpus", "all"], ("0", "1", "2")),
        (["--gpus", "none"], ("cpu",)),
    ],
)
def test_devices(app: Path, words: list[str], chosen: tuple[str, ...]) -> None:
    service, options = _dry(app, *words)
    assert options.devices == chosen
    indices = [] if chosen == ("cpu",) else list(map(int, chosen))
    assert service["plan"]["indices"] == indices
    assert "CUDA_VISIBLE_DEVICES" not in service["env"]


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_not_there(app: Path) -> None:
    result = mdeploy("serve", "app", app, "--gpus", "7", "-d")
    assert (result.code, "no GPU 7" in result.stderr) == (5, True)


def test_a_recipe_and_what_wins_over_it(app: Path, tmp_path: Path) -> None:
    recipe = app.parent / "recipe.yaml"
    recipe.write_text(
        "kind: app\nhandler: [app.py:Echo, app.py:Upper]\nmodel: ./weights\npath: lib\nenv: {A: b}\n"
        "batch: 16\ntimeout: 9\ngpus: none\nmax_body: 1k\nconfig: {upper: {queue: 2, path: /up}}\n"
    )
    (app.parent / "lib").mkdir()
    (app.parent / "weights").mkdir()
    service, options = _dry(recipe, "--batch", "2")
    assert (service["name"], service["env"]["A"]) == ("cats", "b")
    assert service["env"]["MDEPLOY_MODEL_DIR"] == str(app.parent / "weights")
    assert options.handlers == (f"{app}:Echo", f"{app}:Upper")
    assert options.paths == (str(app.parent / "lib"), str(app.parent))
    assert (options.max_batch_size, options.timeout, options.max_body_bytes) == (2, 9.0, 1024)
    assert options.config == {"upper": {"queue_size": 2, "path": "/up"}}
    named = tmp_path / "recipes/zoo/cats"
    named.parent.mkdir(parents=True)
    app.parent.rename(named)
    assert _dry("zoo/cats")[1].handlers[0] == f"{named}/app.py:Echo"


def test_an_old_configuration_of_easy_serve(app: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text("GPUs: '0,1'\nProcessPerGPU: 2\nHandle: cats.app.Upper\n")
    _, options = _dry("-c", old)
    assert (options.devices, options.workers_per_device) == (("cpu",), 4)


# what is refused


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "nothing to serve"),
        (["nowhere.py"], 3, "nowhere.py does not exist"),
        (["cats"], 2, "is a directory"),
        (["foo"], 2, "foo:Class"),
        (["no such"], 2, "is no handler"),
        (["cats/app.py:9x"], 2, "no name of a class"),
        (["cats/app.py:Ecko"], 3, "did you mean Echo?"),
        (["nomod:Echo"], 3, "no module nomod"),
        (["syntax.py"], 78, "syntax.py:2"),
        (["nul.py"], 78, "nul.py"),
        (["missing.yaml"], 3, "no recipe"),
        (["wrong.yaml"], 78, "bacth"),
        (["llm.yaml"], 78, "serve llm"),
        (["secret.yaml"], 78, "HF_TOKEN"),
        (["config.yaml"], 2, "did you mean batch?"),
        (["wrong.yaml", "cats/app.py"], 2, "stands alone"),
        (["cats/app.py", "--name", "a/b"], 2, "no service name"),
        (["cats/app.py", "--python", "/nowhere/python"], 3, "no interpreter"),
        (["cats/app.py", "--python", "/bin/ls"], 78, "no Python"),
        (["cats/app.py", "--python", "./old-python"], 78, "Python 3.9"),
        (["cats/app.py", "--python", "cats/app.py"], 78, "cannot be run"),
        (["cats/app.py", "--path", "/nowhere"], 3, "no directory"),
        (["cats/app.py", "--gpus", "x"], 2, "0,1"),
        (["cats/app.py", "--gpus", "0"], 5, "no GPU 0"),
        (["cats/app.py", "--batch", "0"], 2, "batch must be"),
        (["cats/app.py", "--timeout", "nan"], 2, "timeout must be"),
        (["cats/app.py", "--batch-cost", "-1"], 2, "batch-cost must be"),
        (["cats/app.py", "--max-body", "lots"], 2, "no size"),
        (["cats/app.py", "--cors", "https://a.b/"], 2, "without a path"),
        (["cats/app.py", "--cors", "a.b"], 2, "an origin like"),
        (["cats/app.py", "--host", "192.0.2.1", "--insecure", "-d"], 78, "an address of this machine"),
        (["cats/app.py", "--env", "A"], 2, "--env NAME=VALUE"),
        (["cats/app.py", "--env", "API_KEY=hidden"], 78, "API_KEY"),
        (["cats/app.py", "--env", "CUDA_VISIBLE_DEVICES=1"], 2, "--gpus"),
        (["cats/app.py", "--host", "0.0.0.0"], 2, "--insecure"),
        (["cats/app.py", "--revision", "r"], 2, "--model"),
        (["cats/app.py", "--model", "./nowhere"], 3, "no directory"),
        (["cats/app.py", "--replicas", "2"], 2, "--cluster"),
        (["cats/app.py", "--", "--flag"], 2, "--flag after --"),
        (["-c", "old.yaml", "cats/app.py"], 2, "-c names the handlers"),
    ],
)
def test_wrong_input(home: Path, app: Path, tmp_path: Path, words: list[str], code: int, says: str) -> None:
    (tmp_path / "syntax.py").write_text("\ndef x(:\n")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0")
    (tmp_path / "wrong.yaml").write_text("kind: app\nhandler: cats/app.py\nbacth: 3\n")
    (tmp_path / "llm.yaml").write_text("kind: llm\nmodel: a/b\n")
    (tmp_path / "secret.yaml").write_text("kind: app\nhandler: cats/app.py\nenv: {HF_TOKEN: hidden}\n")
    (tmp_path / "config.yaml").write_text("kind: app\nhandler: cats/app.py\nconfig: {echo: {bacth: 3}}\n")
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\necho mdeploy-python 3.9 /usr/bin/python3.9\n")
    old.chmod(0o755)
    result = mdeploy("serve", "app", *words)
    assert (result.code, "Traceback" in result.stderr) == (code, False), result.stderr
    assert says in result.stderr
    assert "hidden" not in result.stderr
    assert not list(home.glob("services/[!.]*"))


def test_names_that_hold_no_secret_may_be_set(app: Path) -> None:
    assert _dry(app, "--env", "TOKENIZERS_PARALLELISM=false")[0]["env"] == {"TOKENIZERS_PARALLELISM": "false"}


# what is served


def test_init_writes_what_works(tmp_path: Path) -> None:
    made = mdeploy("init", "app", "my-model.2")
    assert (made.code, made.stdout.strip()) == (0, str(tmp_path / "my-model.2"))
    again = mdeploy("init", "app", "my-model.2")
    assert (again.code, "nothing is overwritten" in again.stderr) == (2, True)
    assert mdeploy("init", "app", "../.x").code == 2
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "my-model.2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout
    served = mdeploy("serve", "app", "my-model.2/recipe.yaml", "-d", "--json", *_port())
    assert served.code == 0, served.stderr
    url = served.json["service"]["url"]
    assert _post(f"{url}/my-model.2", {"text": "one two three"}) == {"words": 3}
    measured = mdeploy("bench", "-n", "20", "-c", "2", "--json").json
    assert measured["requests"]["completed"] == 20
    assert measured["workload"]["endpoint"] == "http"
    assert measured["latency_ms"]["e2e"]["p50"] > 0
    assert measured["latency_ms"]["ttft"]["p50"] is None


def test_init_writes_what_can_be_read_wherever_it_is(tmp_path: Path) -> None:
    odd = tmp_path / 'q"""\\N\nx' / "app"
    assert mdeploy("init", "app", odd).code == 0
    for name in ("app.py", "test_app.py"):
        ast.parse((odd / name).read_text())
    assert mdeploy("serve", "app", odd / "recipe.yaml", "--dry-run").code == 0


def test_several_handlers_keys_and_a_rolling_restart(app: Path) -> None:
    served = mdeploy("serve", "app", app, *_port(), "-d", "--json", MDEPLOY_API_KEY="sk-one")
    assert served.code == 0, served.stderr
    url, pid = served.json["service"]["url"], served.json["service"]["pid"]
    assert _post(f"{url}/upper", {"text": "a"}, "sk-one") == "A"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        _post(f"{url}/upper", {"text": "a"})
    new = mdeploy("keys", "add", "cats").stdout.strip()
    assert {_post(f"{url}/upper", {"text": key}, key) for key in ("sk-one", new)} == {"SK-ONE", new.upper()}
    app.write_text(APP.replace(".upper()", ".lower()"))
    restarted = mdeploy("restart", "cats")
    assert restarted.code == 0, restarted.stderr
    assert "2 of 2 workers are new" in restarted.stderr
    assert _post(f"{url}/upper", {"text": "A"}, new) == "a"
    app.write_text(APP.replace("class Upper", "raise RuntimeError('no weights')\nclass Upper"))
    for _ in range(2):  # also while it is "unhealthy" for a moment, since a worker has just ended
        failed = mdeploy("restart", "cats")
        assert (failed.code, "no weights" in failed.stderr, "go on" in failed.stderr) == (1, True, True)
    assert _post(f"{url}/upper", {"text": "A"}, new) == "a"
    service = ps("cats") or {}
    assert (service["phase"], service["pid"]) == ("ready", pid)
    hard = mdeploy("restart", "cats", "--hard")
    assert (hard.code, "no weights" in hard.stderr) == (1, True)


def test_newer_code_does_not_wait_for_code_that_never_loads(app: Path) -> None:
    served = mdeploy("serve", "app", f"{app}:Upper", *_port(), "-d", "--json")
    assert served.code == 0, served.stderr
    begun = app.with_name("begun")
    app.write_text(f"open({str(begun)!r}, 'w')\nwhile True: pass\n")
    with running("restart", "upper") as process:
        until(begun.exists, what="a worker is loading it")
        app.write_text(APP.replace(".upper()", ".lower()"))
        restarted = mdeploy("restart", "upper")
        assert restarted.code == 0, restarted.stderr
        assert _post(f"{served.json['service']['url']}/upper", {"text": "A"}) == "a"
        assert process.wait(30) == 0
    mdeploy("stop", "upper")


def test_a_kernel_that_watches_no_more_files_is_told(app: Path, tmp_path: Path) -> None:
    limit = "echo 0 > /proc/sys/user/max_inotify_watches"
    if subprocess.run(["unshare", "-Ur", "sh", "-c", limit], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces")
    serve = f"{sys.executable} -m mdeploy serve app {app}:Upper --port {free_port()} --reload"
    said = tmp_path / "said"
    with said.open("w") as out:
        words = ["unshare", "-Ur", "sh", "-c", f"{limit}; exec {serve}"]
        process = subprocess.Popen(words, stdout=out, stderr=out)
    with process:
        until(lambda: "changes are not noticed any more" in said.read_text(), what="it says so")
        process.terminate()
        assert process.wait(30) == 0


def test_in_the_foreground_keys_and_restart_work_too(app: Path) -> None:
    port = str(free_port())
    with running("serve", "app", f"{app}:Upper", "--port", port, MDEPLOY_API_KEY="sk-one") as process:
        until(lambda: (ps("upper") or {}).get("phase") == "ready", what="it is ready")
        new = mdeploy("keys", "rotate", "upper").stdout.strip()
        assert _post(f"http://127.0.0.1:{port}/upper", {"text": "a"}, new) == "A"
        restarted = mdeploy("restart", "upper")
        assert restarted.code == 0, restarted.stderr
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("import no_such_library\n", 78, "install it where the workers run"),
        ("class Echo(Handler): ...\n", 78, "neither inference nor forward"),
        ("class Echo(Handler):\n def init(self, d): self.model_dir\n def inference(self, r): ...\n", 78, "--model"),
        ("class Echo(Handler):\n def init(self, d): 1 / 0\n def inference(self, r): ...\n", 1, "app.py, line 3"),
        ("import os\nclass Echo(Handler):\n def init(self, d): os._exit(3)\n forward = init\n", 1, "status 3"),
    ],
)
def test_what_does_not_start_is_told_once(app: Path, text: str, code: int, says: str) -> None:
    app.write_text(f"from mdeploy import Handler\n{text}class Echo2: ...\n")
    result = mdeploy("serve", "app", f"{app}:Echo" if "Echo(" in text else app, "-d", "--name", "e", *_port())
    assert (result.code, says in result.stderr) == (code, True), result.stderr
    service = ps("e") or {}
    assert (service["phase"], service["restarts"]) == ("failed", 0)


def test_bench_asks_what_it_is_told_to(app: Path, tmp_path: Path) -> None:
    url = mdeploy("serve", "app", app, *_port(), "-d", "--json").json["service"]["url"]
    few = ("-n", "4", "-c", "1")
    assert "several handlers: /echo, /upper" in mdeploy("bench", "cats", *few).stderr
    asked = mdeploy("bench", "cats", *few, "--path", "/upper", "--json").json
    assert asked["workload"]["request"]["path"] == "/upper"
    body = tmp_path / "body.json"
    body.write_text('{"text": "from a file"}')
    assert mdeploy("bench", url, *few, "--path", "/upper", "--data", f"@{body}").code in (0, 6)
    refused = mdeploy("bench", "cats", *few, "--path", "/upper", "--data", "no json")
    assert (refused.code, "400" in refused.stderr) == (1, True)
    assert mdeploy("bench", "cats", *few, "--path", "/nope", "--data", "x").code == 3
    assert mdeploy("bench", "cats", *few, "--path", "nope").code == 2
    assert mdeploy("bench", "cats", *few, "--path", "/upper", "--data", "@/nowhere").code == 78
    assert mdeploy("bench", "cats", *few, "--endpoint", "chat", "--data", "x").code == 2
