"""Old classes and configurations through `mdeploy serve app`, asked over HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.compat.test_easyserve import BLUE, checkout
from tests.compat.test_modelserve import TEXT_TO_TEXT, write
from tests.support import free_port, mdeploy


def test_a_class_of_modelserve_and_its_page(tmp_path: Path) -> None:
    file = write(tmp_path, TEXT_TO_TEXT, "example.py")
    (tmp_path / "index.html").write_text("<h1>translate</h1>")
    served = mdeploy("serve", "app", file, "-d", "--port", str(free_port()))
    assert served.code == 0, served.stderr
    with httpx.Client(base_url=served.stdout.strip(), trust_env=False, timeout=30) as http:
        assert http.get("/").text == "<h1>translate</h1>"
        assert http.get("/custom", params={"text": "Hello world"}).json() == {"text": "Hallo Welt"}
        assert http.get("/custom").status_code == 400
        assert set(http.get("/openapi.json").json()["paths"]["/custom"]) >= {"get", "post"}


def test_a_configuration_of_easyserve(tmp_path: Path) -> None:
    config = checkout(tmp_path, 'GPUs: "0"\nProcessPerGPU: 2\nHandle: ClassifyHandle\nlog: x\n')
    served = mdeploy("serve", "app", "-c", config, "-d", "--port", str(free_port()))
    assert served.code == 0, served.stderr
    assert "not used: log" in served.stderr
    with httpx.Client(base_url=served.stdout.strip(), trust_env=False, timeout=30) as http:
        assert http.post("/predict", json=BLUE).json()["task_info"] == {"result": "blue"}
        plain = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's own: aiohttp never looked at it
        assert http.post("/predict", content=b'{"img": "AQID+w=="}', headers=plain).status_code == 200
        assert http.post("/predict", content=b"{").status_code == 400
        assert http.get("/predict").status_code == 405
        (handler,) = http.get("/health").json()["handlers"].values()
        assert len(handler["workers"]) == 2
