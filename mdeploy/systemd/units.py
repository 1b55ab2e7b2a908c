"""Unit files for services: values in, `UnitFile`s out; nothing here looks at the machine or writes to it.

One template holds what is the same for all services, a drop-in each what one of them needs. The
sandbox is what real vLLM was measured to run under. What must never be in it, because it breaks
engines: MemoryDenyWriteExecute (JIT compilers), PrivateDevices (hides GPUs), SystemCallFilter
without @resources (NUMA binding), the default size of a private /dev/shm (tensors are passed in it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdeploy.specs import ServiceSpec
from mdeploy.systemd import quoting

Scope = Literal["system", "user"]

DEFAULT_USER = "mdeploy"
SYSTEM_UNITS = Path("/etc/systemd/system")
SYSUSERS = Path("/etc/sysusers.d/mdeploy.conf")
TMPFILES = Path("/etc/tmpfiles.d/mdeploy.conf")
MODELS = Path("/var/lib/mdeploy/models")
"""Where models may be put that every service user shall read."""

TEMPLATE = "mdeploy@.service"
DROPIN = "50-mdeploy.conf"
GPU_UNIT = "mdeploy-gpu.service"

HIDDEN = ("/root", "/home", "/run/user", "/tmp", "/var/tmp")
"""Trees a sandboxed service sees empty, but for what its unit binds into them."""

_WATCHDOG_S = 60
_STOP_MARGIN_S = 30
"""What the supervisor gets on top of the drain: to kill stragglers and to clear shared memory."""

OLDEST = 245
CREDENTIALS_SINCE = 247
_SINCE = {"ProtectProc": 247, "RestartSteps": 254, "RestartMaxDelaySec": 254}
"""Keys that came after the oldest systemd we support: an unknown one would be a complaint at every boot."""


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A file to be written: where it belongs, its text and its mode."""

    path: str
    content: str
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Target:
    """Where units go and which systemd reads them. `directory` holds the units."""

    scope: Scope
    directory: Path
    version: int


@dataclass(frozen=True, slots=True)
class Program:
    """The mdeploy that units start: its interpreter, and the trees it is read from."""

    python: str
    trees: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resident:
    """One service on this machine: its spec and home, who runs it, what it must be shown.

    `binds` are paths that it or its program reads and that lie in hidden trees, `mounts` all it reads.
    `groups` own device nodes that not everybody may open.
    """

    spec: ServiceSpec
    home: str
    user: str = DEFAULT_USER
    binds: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def directory(self) -> str:
        """The service's own directory, the only one it may write to beside its cache."""
        return f"{self.home}/services/{self.spec.name}"

    @property
    def on_gpus(self) -> bool:
        """True for a service that needs GPU device nodes."""
        return self.spec.plan is not None and self.spec.plan.device == "cuda"


def unit_name(service: str) -> str:
    """The instance that runs a service; a service's name needs no escaping."""
    return f"mdeploy@{service}.service"


def is_below(path: str, trees: Iterable[str]) -> bool:
    """True for a path in one of these trees."""
    return any(path == tree or path.startswith(f"{tree}/") for tree in trees)


# files


def template(target: Target) -> UnitFile:
    """The unit every service shares. Which program runs is each service's own: a machine may have several mdeploys."""
    system = target.scope == "system"
    after = "network-online.target remote-fs.target"
    if system:
        after += f" nvidia-persistenced.service nvidia-fabricmanager.service {GPU_UNIT}"
    lines = [
        "# Written by `mdeploy install-systemd`, which writes it again: changes belong into a drop-in.",
        "[Unit]",
        "Description=mdeploy service %i",
        f"AssertPathExists={quoting.raw(str(target.directory))}/mdeploy@%i.service.d/{DROPIN}",
        *([f"After={after}", "Wants=network-online.target"] if system else []),
        "StartLimitIntervalSec=30min",
        "StartLimitBurst=5",
        "",
        "[Service]",
        *_LIFE,
        *(_SYSTEM_LIMITS if system else ()),
        "",
        *(_SANDBOX if system else ("NoNewPrivileges=yes",)),
        "",
        "[Install]",
        f"WantedBy={'multi-user' if system else 'default'}.target",
    ]
    known = (line for line in lines if _SINCE.get(line.partition("=")[0], 0) <= target.version)
    return UnitFile(str(target.directory / TEMPLATE), _text(known))


_LIFE = (
    "Type=notify",
    "NotifyAccess=main",
    "WorkingDirectory=/",
    "Restart=always",
    "RestartSec=10",
    "RestartPreventExitStatus=78",
    "KillMode=mixed",
    "TimeoutStartSec=10min",
    f"WatchdogSec={_WATCHDOG_S}",
    "OOMPolicy=stop",
    "UMask=0077",
    "LimitCORE=0",
    "RestartSteps=4",
    "RestartMaxDelaySec=2min",
)

_SYSTEM_LIMITS = ("OOMScoreAdjust=-100", "LimitNOFILE=1048576", "LimitMEMLOCK=infinity", "TasksMax=infinity")

_SANDBOX = (
    f"User={DEFAULT_USER}",
    "CacheDirectory=mdeploy/%i",
    "CacheDirectoryMode=0700",
    "Environment=HOME=/var/cache/mdeploy/%i XDG_CACHE_HOME=/var/cache/mdeploy/%i",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "ProtectHome=tmpfs",
    "PrivateTmp=yes",
    "PrivateMounts=yes",
    "TemporaryFileSystem=/dev/shm:mode=1777,size=50%",
    "DevicePolicy=closed",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "RemoveIPC=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service pidfd_getfd process_vm_readv process_vm_writev",
    "SystemCallErrorNumber=EPERM",
)


def dropin(target: Target, program: Program, resident: Resident) -> UnitFile:
    """What one service needs beside the template. Raises ConfigError for a name that no unit can hold."""
    spec = resident.spec
    others = [unit_name(name) for name in spec.depends_on]
    if target.scope == "system" and resident.on_gpus:
        others.append(GPU_UNIT)
    lines = [
        "# Written by `mdeploy install-systemd`.",
        "[X-Mdeploy]",
        f"Service={json.dumps({'home': resident.home, 'user': resident.user}, ensure_ascii=False)}",
        "",
        "[Unit]",
        *([f"Wants={' '.join(others)}", f"After={' '.join(others)}"] if others else []),
        *(f"RequiresMountsFor={quoting.word(path)}" for path in resident.mounts if target.scope == "system"),
        "",
        "[Service]",
        "ExecStart=",
        f"ExecStart={quoting.command(program.python, '-m', 'mdeploy', 'run')} %i --manager systemd",
        f"Environment={quoting.word(f'MDEPLOY_HOME={resident.home}')}",
        f"TimeoutStopSec={spec.limits.stop_timeout_s + _STOP_MARGIN_S:.0f}",
        *(["Restart=no"] if spec.restart == "never" else []),
        # the system's services get copies of their keys, made when they start: reading these again changes nothing
        *(["ExecReload=/bin/kill -HUP $MAINPID"] if spec.reloads and target.scope == "user" else []),
        *(_own_sandbox(resident) if target.scope == "system" else []),
    ]
    return UnitFile(str(target.directory / f"{unit_name(spec.name)}.d" / DROPIN), _text(lines))


def _own_sandbox(resident: Resident) -> list[str]:
    home, directory = resident.home, resident.directory
    lines = [f"User={resident.user}"]
    # of the user made for services it clears up after them; a person has more in /dev/shm than these
    lines += ["RemoveIPC=no"] if resident.user != DEFAULT_USER else []
    lines += [f"SupplementaryGroups={' '.join(resident.groups)}"] if resident.groups else []
    if not is_below(home, HIDDEN):  # its neighbours, their keys and our settings are none of its business
        lines.append(f"TemporaryFileSystem={quoting.member(home, 'ro')}")
    lines += [f"BindPaths={quoting.word(directory)}", f"ReadWritePaths={quoting.word(directory)}"]
    lines += [f"BindReadOnlyPaths={quoting.word(path)}" for path in resident.binds]
    lines += [f"LoadCredential={credential(file)}" for file in sorted(set(resident.spec.secrets.values()))]
    return lines + (list(_GPU_DEVICES) if resident.on_gpus else [])


_GPU_DEVICES = (
    "DeviceAllow=char-nvidia* rw",  # names of /proc/devices: nvidia, nvidia-uvm, nvidia-caps …
    "DeviceAllow=char-infiniband* rw",
    "DeviceAllow=/dev/infiniband/rdma_cm rw",
)


def credential(file: str) -> str:
    """`NAME:FILE` of LoadCredential=; the service finds the file under its own name."""
    return f"{quoting.raw(Path(file).name)}:{quoting.raw(file)}"


def gpu_unit(target: Target, nvidia_modprobe: str, minors: Iterable[int]) -> UnitFile:
    """Loads the driver at boot and makes its device nodes.

    A machine without a desktop has no /dev/nvidia-uvm until root asks for it, and a service may not.
    It is a unit of its own because the devices a service may open are looked up before its first
    command runs: those that ExecStartPre= makes would come too late.
    """
    nodes = " ".join(f"-c {minor}" for minor in minors) or "-c 0"
    lines = [
        "# Written by `mdeploy install-systemd`.",
        "[Unit]",
        "Description=GPU driver and device nodes for mdeploy services",
        "After=systemd-modules-load.service",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        f"ExecStart=-{quoting.command(nvidia_modprobe)} -u {nodes}",
    ]
    return UnitFile(str(target.directory / GPU_UNIT), _text(lines))


def sysusers() -> UnitFile:
    """The user that services run as: no DynamicUser, its groups and files are to stay its own."""
    line = f'u {DEFAULT_USER} - "mdeploy model services" /var/lib/mdeploy /usr/sbin/nologin'
    return UnitFile(str(SYSUSERS), _text(["# Written by `mdeploy install-systemd`.", line]))


def tmpfiles() -> UnitFile:
    """Directories of the machine: where models that all service users shall read may be put."""
    lines = [f"d {path} 0755 root root -" for path in (MODELS.parent, MODELS)]
    return UnitFile(str(TMPFILES), _text(["# Written by `mdeploy install-systemd`.", *lines]))


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


# the way back


@dataclass(frozen=True, slots=True)
class Installed:
    """What a drop-in of ours says of its service; `credentials` are the names of the files it hands over."""

    service: str
    home: str
    user: str
    credentials: frozenset[str] = frozenset()


def read_dropin(path: Path) -> Installed | None:
    """The inverse of `dropin`, as far as others need it; None for a file that is not ours."""
    service = path.parent.name.removeprefix("mdeploy@").removesuffix(".service.d")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        noted: Mapping[str, str] = json.loads(next(li[8:] for li in lines if li.startswith("Service={")))
        loaded = (line.partition("=")[2].partition(":")[0] for line in lines if line.startswith("LoadCredential="))
        return Installed(service, noted["home"], noted["user"], frozenset(loaded))
    except (OSError, ValueError, KeyError, StopIteration):
        return None
