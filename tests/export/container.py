"""A service of a compose file, run as its container would be: only its mounts, a read-only system, no capability.

There is no Docker on a test machine; a mount and a network namespace with a root of its own are what it would make.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import REPO

_MAKE = r"""set -e
root=$1 bin=$2; shift 2
mount -t tmpfs tmpfs "$root"
for path in /*; do
  case $path in
    /tmp|/run|/models|/data|/cache) ;;
    *) if [ -L "$path" ]; then cp -P "$path" "$root$path"
       elif [ -d "$path" ]; then mkdir "$root$path"; mount --rbind "$path" "$root$path"; fi ;;
  esac
done
mkdir -p "$root/tmp" "$root/cache" "$root/run/secrets" "$root/engine"
mount --bind "$bin" "$root/engine"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=1777 tmpfs "$root/cache"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; touch "$root$2"; fi
  mount --bind "$1" "$root$2"
  mount -o remount,bind,ro "$root$2"
  shift 2
done
shift
mount -o remount,ro "$root"
ip link set lo up
exec chroot "$root" setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


@dataclass(frozen=True)
class Container:
    """A running service."""

    process: subprocess.Popen[bytes]
    service: Mapping[str, Any]

    def healthy(self) -> bool:
        """Whether the health check of the file succeeds in it."""
        test = [_plain(word) for word in self.service["healthcheck"]["test"][1:]]
        target = ["nsenter", "-t", str(self.process.pid), "--mount", "--net", "--root", "--wd=/"]
        words = [*target, "env", "-i", *_environment(self.service), *test]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0


@contextmanager
def running(document: Mapping[str, Any], name: str, image: Path, root: Path) -> Iterator[Container]:
    """Run a service of the file; `image` is the environment whose `python3` the image would have."""
    service = document["services"][name]
    mounts = [(mount["source"], mount["target"]) for mount in service["volumes"] if mount["type"] == "bind"]
    mounts += [(document["secrets"][one["source"]]["file"], one["target"]) for one in service.get("secrets", ())]
    mounts.append((str(REPO), str(REPO)))  # the environment's mdeploy is installed in place
    root.mkdir()
    words = [_plain(word) for word in (*service["entrypoint"], *service["command"])]
    flat = [part for pair in mounts for part in pair]
    make = ["unshare", "--mount", "--net", "--propagation", "private", "bash", "-c", _MAKE, "bash"]
    log = root.with_suffix(".log").open("wb")
    started = [*make, str(root), str(image), *flat, "--", "env", "-i", *_environment(service), *words]
    with log, subprocess.Popen(started, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            yield Container(process, service)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def _environment(service: Mapping[str, Any]) -> list[str]:
    variables = {"PATH": "/engine/bin:/usr/bin:/bin", **service["environment"]}
    return [f"{name}={_plain(value)}" for name, value in variables.items()]


def _plain(text: str) -> str:
    """What compose makes of a text."""
    return text.replace("$$", "$")
