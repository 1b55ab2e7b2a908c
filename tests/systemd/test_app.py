"""An app as a unit: the user's file in a home is shown read-only, workers are replaced, keys are taken over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import Result
from tests.systemd.box import Box

APP = """\
import os, pathlib
from mdeploy import Handler


class Where(Handler):
    example = {"n": 1}

    def init(self, device):
        from beside import VALUE
        self.value = VALUE

    def inference(self, request):
        place = pathlib.Path(__file__).parent
        others = sorted(p.name for p in place.parent.iterdir())
        return {"value": self.value, "uid": os.getuid(), "others": others, "writable": os.access(place, os.W_OK)}
"""
PLACE = "/root/projects/where"
ASK = """
import sys, urllib.request
request = urllib.request.Request("http://127.0.0.1:8000/where", b"{}", {"Content-Type": "application/json"})
if sys.argv[1:]:
    request.add_header("Authorization", "Bearer " + sys.argv[1])
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


@pytest.fixture(scope="module")
def app(shared_box: Box) -> Iterator[Box]:
    """The app, installed; with an interpreter of its user's own, in a home too."""
    shared_box.ok("mkdir", "-p", PLACE, "/root/projects/private")
    shared_box.write(f"{PLACE}/app.py", APP)
    shared_box.write(f"{PLACE}/beside.py", "VALUE = 1\n")
    shared_box.ok("python3", "-m", "venv", "--without-pip", "/root/env")
    shared_box.write("/srv/mdeploy.yaml", _file(PLACE))
    installed = shared_box.mdeploy("install-systemd", "--file", "/srv/mdeploy.yaml", "--json")
    assert installed.code == 0, installed.stdout + installed.stderr
    yield shared_box
    shared_box.clean()


def _file(place: str) -> str:
    return (
        "version: 1\nservices:\n  where:\n    kind: app\n    port: 8000\n    python: /root/env\n"
        f"    handler: {place}/app.py:Where\n    auth: {{key: generate}}\n"
    )


def _key(box: Box) -> str:
    return box.ok("head", "-n1", "/var/lib/mdeploy/secrets/where.api-key").strip()


def _done(result: Result) -> Result:
    assert result.code == 0, result.stdout + result.stderr
    return result


def test_the_handler_sees_its_own_directory_and_nothing_else(app: Box) -> None:
    answer = app.python(ASK, _key(app))
    assert '"others":["where"]' in answer.replace(" ", "")
    assert '"writable":false' in answer.replace(" ", "")
    assert '"uid":0' not in answer.replace(" ", "")


def test_workers_are_replaced_while_it_serves(app: Box) -> None:
    before = app.ready("where")
    app.write(f"{PLACE}/beside.py", "VALUE = 2\n")
    assert "1 of 1 workers are new" in _done(app.mdeploy("restart", "where")).stderr
    assert '"value":2' in app.python(ASK, _key(app)).replace(" ", "")
    after = app.ready("where")
    assert (after["run_id"], after["engine_pid"]) == (before["run_id"], before["engine_pid"])


def test_a_new_key_is_taken_over(app: Box) -> None:
    new = _done(app.mdeploy("keys", "rotate", "where")).stdout.strip()
    assert "value" in app.python(ASK, new)


def test_a_handler_in_a_home_itself_is_refused(app: Box) -> None:
    app.write("/root/app.py", APP)
    app.write("/srv/home.yaml", _file("/root").replace("8000", "8001").replace("where:", "bare:"))
    refused = app.mdeploy("install-systemd", "--file", "/srv/home.yaml")
    assert refused.code == 78
    assert "the service reads /root itself" in refused.stderr
    assert app.ps("bare") is None
