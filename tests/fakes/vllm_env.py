"""A stand-in for an environment that holds vLLM: a real interpreter, a real process tree, no torch.

It takes `vllm serve`'s command line, prints the log lines the real one prints, keeps an
EngineCore in a session of its own with a shared memory segment, exits 0 when that core is
killed (as the real one does) and answers over HTTP. Modes are chosen by FAKE_VLLM_MODE.
"""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

VERSION = "0.32.0"

_ARG_UTILS = """
def add_cli_args(parser):
    parser.add_argument("--tensor-parallel-size", "-tp")
    parser.add_argument("--max-model-len")
    parser.add_argument("--max-num-seqs")
    parser.add_argument("--enforce-eager")
    parser.add_argument("--enable-log-requests")
    parser.add_argument("--load-format")
    parser.add_argument("--shutdown-timeout")
    parser.add_argument("--disable-access-log-for-endpoints")
"""

_MAIN = r'''
import argparse, http.server, json, mmap, os, signal, subprocess, sys, threading, time

CORE = """
import os, signal, sys, time
import zlib
path = "/dev/shm/psm_fake%08x_%d" % (zlib.crc32(os.environ.get("MDEPLOY_HOME", "").encode()), os.getpid())
fd = os.open(path, os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 4096)
import mmap
segment = mmap.mmap(fd, 4096)
print(path, flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    time.sleep(3600)
"""

def log(text):
    print("(APIServer pid=%d) INFO 11-21 05:44:13 [fake.py:1] %s" % (os.getpid(), text), flush=True)

class Api(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tokens = 0
    def answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        note = os.environ.get("FAKE_VLLM_SICK", "/nonexistent")
        sick = os.path.exists(note)
        if sick:
            with open(note, "a") as file:
                file.write("asked\n")
        if self.path == "/metrics":
            return self.metrics()
        self.answer(503 if sick else 200, {})
    def metrics(self):
        busy = os.environ.get("FAKE_VLLM_BUSY", "/nonexistent")
        if os.path.exists(busy):
            Api.tokens += 1
            with open(busy, "a") as file:
                file.write("worked\n")
        body = ("vllm:generation_tokens_total{engine=\"0\"} %d\n" % Api.tokens).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if KEYS and self.headers.get("Authorization", "").removeprefix("Bearer ") not in KEYS:
            return self.answer(401, {"error": {"message": "Unauthorized"}})
        if MODE == "refuses":
            return self.answer(404, {"error": {"message": "The model does not exist."}})
        if MODE == "never-answers":
            return self.answer(500, {"error": {"message": "EngineCore encountered an issue"}})
        while os.path.exists(os.environ.get("FAKE_VLLM_HUNG", "/nonexistent")):
            time.sleep(0.05)
        Api.tokens += 1
        self.answer(200, {"choices": [{"text": "!"}]})
    def log_message(self, *args):
        pass

MODE = os.environ.get("FAKE_VLLM_MODE", "ok")
KEYS = {os.environ["VLLM_API_KEY"]} if os.environ.get("VLLM_API_KEY") else set()
if KEYS & {os.environ.get("FAKE_VLLM_REFUSES_KEY")}:
    sys.exit("ValueError: this key is refused")

def reload(*_):
    """What an engine that can have several keys does at SIGHUP; vLLM has no such thing."""
    if os.environ.get("FAKE_VLLM_KEYS"):
        with open(os.environ["FAKE_VLLM_KEYS"]) as file:
            KEYS.clear()
            KEYS.update(file.read().split())
    if os.environ.get("FAKE_VLLM_RELOADED"):
        open(os.environ["FAKE_VLLM_RELOADED"], "w").close()

parser = argparse.ArgumentParser()
parser.add_argument("command")
parser.add_argument("model")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int)
options, rest = parser.parse_known_args()
log("vLLM API server version 0.32.0")
log("argv " + json.dumps(rest))
if MODE == "no-kv":
    print("Traceback (most recent call last):", flush=True)
    print("ValueError: To serve at least one request with the models's max seq len (131072), (3.5 GiB KV cache is "
          "needed, which is larger than the available KV cache memory (1.2 GiB).", flush=True)
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
if MODE == "bad-config":
    print("pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig", flush=True)
    print("  Value error, the quantization method awx is not supported [type=value_error]", flush=True)
    sys.exit(1)
log("Starting to load model")
while os.path.exists(os.environ.get("FAKE_VLLM_LOADS", "/nonexistent")):  # as long as the file is there
    time.sleep(0.05)
if os.environ.get("FAKE_VLLM_MAPS"):
    with open(os.environ["FAKE_VLLM_MAPS"], "r+b") as shared:
        mapped = mmap.mmap(shared.fileno(), 0)
core = subprocess.Popen([sys.executable, "-c", CORE], stdout=subprocess.PIPE, start_new_session=True)
core.stdout.readline()
if MODE == "ignores-term":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    def stop(*_):
        os.kill(core.pid, signal.SIGKILL)
        os._exit(0)
    signal.signal(signal.SIGTERM, stop)
if os.environ.get("FAKE_VLLM_RELOADED") or os.environ.get("FAKE_VLLM_KEYS"):
    signal.signal(signal.SIGHUP, reload)
server = http.server.ThreadingHTTPServer((options.host, options.port), Api)
threading.Thread(target=server.serve_forever, daemon=True).start()
log("Application startup complete.")
core.wait()
log("EngineCore died")
sys.exit(0)
'''


def segments(home: Path) -> set[str]:
    """Shared memory of the stand-ins of one home, and of no other test's."""
    mark = zlib.crc32(str(home).encode())
    return {path.name for path in Path("/dev/shm").glob(f"psm_fake{mark:08x}_*")}


def make(root: Path, version: str = f"{VERSION}+cpu") -> Path:
    """Build the environment under `root`; returns its interpreter. Without +cpu it is a CUDA build."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    site = next(root.glob("lib/python3*/site-packages"))
    _write(site / "vllm/__init__.py", "")
    _write(site / "vllm/engine/arg_utils.py", _ARG_UTILS)
    _write(site / "vllm/entrypoints/__init__.py", "")
    _write(site / "vllm/entrypoints/cli/__init__.py", "")
    _write(site / "vllm/entrypoints/cli/main.py", _MAIN)
    _write(site / f"vllm-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return root / "bin" / "python"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
