"""Two machines behind a real nginx, rendered by us: one dies under load and comes back, and no request fails."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mdeploy.export import address, nginx
from tests.export import lab
from tests.export.lab import Load, Machine
from tests.support import until

Server = Callable[[Machine, str, int, str], AbstractContextManager[subprocess.Popen[str]]]
A, B = "127.0.0.1:9001", "10.77.0.2:9002"


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with lab.two_machines() as both:
        yield both


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.conf"
    servers = tuple(address.server(text) for text in (A, B))
    path.write_text(nginx.render(nginx.Site("echo", "app", servers, (address.listen("127.0.0.1:8080"),))))
    return path


@pytest.mark.parametrize("serve", [lab.echo, lab.app], ids=["echo", "app"])
def test_a_killed_server_costs_no_request_and_is_used_again(
    machines: tuple[Machine, Machine], site: Path, tmp_path: Path, serve: Server
) -> None:
    near, far = machines
    with serve(near, "127.0.0.1", 9001, "a"), lab.nginx(near, tmp_path / "nginx", site):
        with serve(far, "0.0.0.0", 9002, "b") as server, Load(near, 8080, streams=serve is lab.echo) as load:
            load.more("a")
            load.more("b")
            server.kill()
            load.more("a", 100)
            with serve(far, "0.0.0.0", 9002, "b"):
                load.more("b")
        assert load.failures == []


def test_a_machine_whose_packets_vanish_costs_no_request(
    machines: tuple[Machine, Machine], site: Path, tmp_path: Path
) -> None:
    near, far = machines
    # what README tells to set, but shorter: without it TCP itself takes minutes to give up what is on its way
    for name, value in (("keepalive_time", 1), ("keepalive_intvl", 1), ("keepalive_probes", 3), ("retries2", 3)):
        near.run("sysctl", "-w", f"net.ipv4.tcp_{name}={value}")
    with (
        lab.echo(near, "127.0.0.1", 9001, "a"),
        lab.echo(far, "0.0.0.0", 9002, "b"),
        lab.nginx(near, tmp_path / "nginx", site) as log,
        Load(near, 8080) as load,
    ):
        load.more("b")
        far.run("ip", "link", "set", "cable", "down")
        until(lambda: "timed out" in log.read_text(), what="nginx misses the machine")
        load.more("a", 100)
        far.run("ip", "link", "set", "cable", "up")
        load.more("b")
    assert load.failures == []
