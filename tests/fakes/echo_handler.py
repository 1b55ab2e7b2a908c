"""The answers of echo_server.py from one of our own apps, for tests that put several of them behind something."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

from mdeploy.serving.handler import Handler, Request


class Echo(Handler):
    """Says who it is and what it got, after the delay it is asked for."""

    path = "/v1/x"
    example = b"hello"

    def inference(self, request: Request) -> Any:
        time.sleep(float(request.query.get("delay", "0")))
        return {"server": os.environ["ECHO_NAME"], "sha256": hashlib.sha256(request.body).hexdigest()}
