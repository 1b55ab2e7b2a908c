"""An embedding service that is quick to start and can be slow, busy or dying.

`python embed_server.py PORT [--key K] [--salt S] [--delay S] [--busy N] [--die-after N] [--fault F]`: vectors are made
of a hash of the text (and of what changes it), so that they can be told apart and do not depend on who is in the same
request, unless that is the fault.
Texts of more than 50 words are too long, `broken` is a text that fails with 500 once and then is fine.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

DIM = 8
LONGEST = 50
MODEL = "hash-8"


def vector(text: str, salt: str = "", dim: int = DIM) -> list[float]:
    """Of norm 1, float32."""
    words = struct.unpack("<8i", hashlib.sha256((salt + text).encode()).digest())[:dim]
    length = math.sqrt(sum(word * word for word in words))
    return list(struct.unpack(f"<{dim}f", struct.pack(f"<{dim}f", *(word / length for word in words))))


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.error = status, {"message": message, "type": "error", "code": code, "param": param}


class State:
    """What all connections share."""

    lock = threading.Lock()
    asked = 0
    running = 0
    most = 0
    broken: ClassVar[set[str]] = set()


class Service(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif self.path == "/health":
            self._answer(200, {"status": "ok", "model": MODEL, "kind": "embedder", "dim": DIM, "most": State.most})
        else:
            self._answer(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with State.lock:
            State.asked += 1
            number = State.asked
            State.running += 1
            State.most = max(State.most, State.running)
        try:
            if number == args.die_after:
                os._exit(1)
            if 1 < number <= args.busy + 1:
                raise RefusedError(503, "too much to do", "overloaded")
            time.sleep(args.delay)
            self._answer(200, self._embedded(body))
        except RefusedError as error:
            self._answer(error.status, {"error": error.error})
        finally:
            with State.lock:
                State.running -= 1

    def _embedded(self, body: dict[str, Any]) -> dict[str, Any]:
        if args.key and self.headers.get("Authorization") != f"Bearer {args.key}":
            raise RefusedError(401, "the API key is wrong", "invalid_api_key")
        if body["model"] != MODEL:
            raise RefusedError(404, f"no model {body['model']}", "model_not_found", "model")
        dim = body.get("dimensions", DIM)
        if dim > DIM:
            raise RefusedError(400, f"dimensions is at most {DIM}", "bad_request", "dimensions")
        salt = args.salt + "".join(str(body.get(name, "")) for name in ("prompt_name", "instruction", "input_type"))
        if args.fault == "mates" and len(body["input"]) > 1:
            salt += body["input"][0]
        data = []
        for index, text in enumerate(body["input"]):
            self._check(text, index, cut=body.get("truncate", False))
            found: Any = vector(text, salt, dim)
            if args.fault == "norm":
                found = [1.1 * value for value in found]
            if body["encoding_format"] == "base64":
                found = base64.b64encode(struct.pack(f"<{dim}f", *found)).decode()
            data.append({"object": "embedding", "index": index, "embedding": found})
        count = sum(len(text.split()) for text in body["input"])
        if args.fault == "order":
            data = [{**row, "index": index} for index, row in enumerate(sorted(data, key=lambda row: row["embedding"]))]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": MODEL, "data": data[::-1], "usage": usage}

    def _check(self, text: str, index: int, *, cut: bool) -> None:
        if not text:
            raise RefusedError(400, f"input[{index}] is empty", "empty", f"input[{index}]")
        if len(text.split()) > LONGEST and not cut:
            words = len(text.split())
            raise RefusedError(400, f"{words} tokens, at most {LONGEST}", "context_length_exceeded", f"input[{index}]")
        if text == "broken" and text not in State.broken:
            State.broken.add(text)
            raise RefusedError(500, "internal error", "internal_error")
        if text == "nan":
            raise RefusedError(500, "the model gives no vector for this text", "bad_vector", f"input[{index}]")

    def _answer(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--key", default="")
    parser.add_argument("--salt", default="")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--fault", choices=("mates", "norm", "order"))
    args = parser.parse_args()
    server = Server(("127.0.0.1", args.port), Service)
    print("listens", flush=True)
    server.serve_forever()
