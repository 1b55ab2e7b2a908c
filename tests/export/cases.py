"""Workloads and sites that the tests of this package render: a plain one, one with everything, one with odd words."""

from __future__ import annotations

from mdeploy.export import address
from mdeploy.export.nginx import Site, Tls
from mdeploy.export.workload import Key, Tree, Workload
from mdeploy.specs import Limits, Probe

ODD = """$HOME $(HOME) "q" it's a\\b 模型 1e3 # : - yes"""
_SERVE = ("python3", "-m", "vllm.entrypoints.cli.main", "serve")
_ASKED = {"model": "chat", "prompt": "Hi", "max_tokens": 1}

CPU = Workload(
    name="chat",
    kind="llm",
    image="vllm-cpu",
    version="0.32.0",
    words=(*_SERVE, "/models/m", "--host", "0.0.0.0", "--port", "8000"),
    env={"OMP_NUM_THREADS": "4"},
    host="127.0.0.1",
    port=8000,
    probe=Probe("/health", "/v1/completions", _ASKED),
    cores=4,
    trees=(Tree("/srv/m", "/srv/models/m", "/models/m"),),
)
GPU = Workload(
    name="Big.v1_a",
    kind="llm",
    image="vllm-cuda",
    version="0.32.0",
    words=(*_SERVE, "/models/big", "--tensor-parallel-size", "2", "--override", ODD),
    env={"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "ODD": ODD, "YES": "yes", "N": "1e3"},
    host="::",
    port=8001,
    probe=Probe("/health", "/v1/completions", _ASKED, bearer="VLLM_API_KEY"),
    gpus=(2, 3),
    trees=(Tree("/m/big", "/m/big", "/models/big"), Tree("/etc/t.jinja", "/etc/t.jinja", "/data/t.jinja")),
    key=Key("VLLM_API_KEY", "/var/lib/mdeploy/secrets/Big.v1_a.api-key", (0, 0)),
    limits=Limits(stop_timeout_s=120, start_timeout_s=3600),
    restart="always",
    depends_on=("chat", "elsewhere"),
)
APP = Workload(
    name="caption",
    kind="app",
    image="app",
    version="0.1.0",
    words=("python3", "-m", "mdeploy.apps", "app", "--service=caption", "--host=0.0.0.0", "--handler=/app/code/a.py:A"),
    env={"MDEPLOY_MODEL_DIR": "/models/blip"},
    host="0.0.0.0",
    port=8002,
    probe=Probe("/health", "/ready", {}, bearer="MDEPLOY_API_KEYS_FILE"),
    gpus=(1,),
    trees=(Tree("/m/blip", "/m/blip", "/models/blip"),),
    code=(Tree("/srv/app", "/srv/app", "/app/code"), Tree("/srv/two words", "/srv/two words", "/app/code2")),
    key=Key("MDEPLOY_API_KEYS_FILE", "/home/a/secrets/caption.api-key", (1000, 1000)),
    restart="never",
)
OPEN_APP = Workload(
    name="echo",
    kind="app",
    image="app",
    version="0.1.0",
    words=("python3", "-m", "mdeploy.apps", "app", "--service=echo", "--host=0.0.0.0"),
    env={},
    host="127.0.0.1",
    port=8003,
    probe=Probe("/health", "/ready", {}),
    code=(Tree("/srv/echo", "/srv/echo", "/app/code"),),
)
ALL = (CPU, GPU, APP, OPEN_APP)

PLAIN_SITE = Site("echo", "app", (address.server("127.0.0.1:8003"),), (address.listen("80"),), max_body_bytes=1000)
FULL_SITE = Site(
    "Chat.v1",
    "llm",
    tuple(map(address.server, ("127.0.0.1:8000", "[fd00::6]:8000", "node-7.example.org:8000", "unix:/run/chat.sock"))),
    tuple(map(address.listen, ("443", "127.0.0.1:8443", "[::1]:8443", "unix:/run/front.sock"))),
    names=("api.example.org", "*.api.example.org"),
    tls=Tls("/etc/ssl/two words/chain.pem", "/etc/ssl/key.pem"),
    guard="ask",
    key_file="/etc/nginx/conf.d/chat.key",
    keys=("sk-one", "sk-two"),
)
