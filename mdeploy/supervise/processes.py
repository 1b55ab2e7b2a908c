"""Finding and ending every process of a run, whatever it did to hide: own session, own title, no parent.

A run is marked by one environment variable that all descendants inherit. Process groups miss
children that call setsid; parent links break when a parent dies; the marker survives both,
as long as SPT_NOENV keeps the setproctitle library from overwriting /proc/PID/environ.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MARKER = "MDEPLOY_RUN_ID"

SECRETS = (
    "MDEPLOY_API_KEY",
    "MDEPLOY_API_KEYS_FILE",
    "MDEPLOY_CLUSTER_TOKEN",
    "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_SDK_TOKEN",
    "VLLM_API_KEY",
)
"""Variables of the caller that a supervisor and an engine have no business with: keys come from files."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_PROC = Path("/proc")
_SHM = Path("/dev/shm")
_SCRATCH = "mdeploy-run-"


def marker_environment(run_id: str) -> dict[str, str]:
    """What a child must have in its environment to be found again."""
    return {MARKER: run_id, "SPT_NOENV": "1"}


def become_subreaper() -> None:
    """Orphans of our run become our children, so that they can be waited for."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(sig: int = signal.SIGTERM) -> Callable[[], None]:
    """A `preexec_fn` that has the kernel send `sig` to the child when its parent dies.

    The library is loaded here: between fork and exec there must be no import and no allocation
    of locks.
    """
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def arm() -> None:
        signal.signal(sig, signal.SIG_DFL)  # our own handler is still there, and would swallow it until exec
        libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)
        if os.getppid() != parent:  # it died before we were armed
            os._exit(128 + sig)

    return arm


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def boot_id() -> str:
    """Changes at every boot: a pid from before it means nothing."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def created(pid: int) -> float | None:
    """Start time of a process in clock ticks after boot; None where there is none or only a zombie."""
    stat = _stat(pid)
    return None if stat is None or stat[0] in ("Z", "X") else float(stat[19])


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state (field 3) on; the name before it may hold anything."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def is_frozen(pid: int) -> bool:
    """True while a process is stopped by a signal (SIGSTOP); one under a debugger is not."""
    stat = _stat(pid)
    return stat is not None and stat[0] == "T"


def is_same(pid: int, when: float) -> bool:
    """True while the process that started at `when` lives; a reused pid is another process."""
    return created(pid) == when


def marked(run_id: str) -> tuple[int, ...]:
    """Pids of all living processes of a run, ours excepted."""
    return tuple(pid for pid in _all_pids() if pid != os.getpid() and is_marked(pid, run_id))


def _all_pids() -> Iterable[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def is_marked(pid: int, run_id: str) -> bool:
    """True for a living process of a run."""
    needle = f"{MARKER}={run_id}".encode()
    try:
        environ = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:  # gone, or somebody else's
        return False
    return needle in environ.split(b"\0") and created(pid) is not None


def send(pids: Iterable[int], sig: int) -> None:
    """Signal processes; one that is gone already is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)


def sweep(run_id: str, timeout_s: float = 10.0) -> tuple[int, ...]:
    """KILL whatever bears the marker until nothing does; returns what would not die.

    New ones may be forked while the old are killed, so it looks again until it finds none.
    """
    deadline = time.monotonic() + timeout_s
    while survivors := marked(run_id):
        if time.monotonic() > deadline:
            return survivors
        send(survivors, signal.SIGKILL)
        reap()
        time.sleep(0.02)
    return ()


def reap() -> None:
    """Collect every dead child, adopted orphans included."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def reap_orphans(engine: int) -> None:
    """Collect dead children that were adopted, and leave `engine` to whoever waits for it."""
    with contextlib.suppress(ChildProcessError):
        while True:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None or dead.si_pid == engine:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)


def descendants(pid: int) -> tuple[int, ...]:
    """Children of a process and theirs, quickly; those whose parent died are not among them."""
    found: list[int] = []
    for path in _PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return tuple(found)


def shared_memory(pids: Iterable[int]) -> frozenset[str]:
    """Files in /dev/shm that these processes have mapped or open.

    They are matched by inode: glibc's sem_open maps a file under one name and then gives it
    another, so the name in /proc/PID/maps is not the one that stays behind.
    """
    inodes = {inode for pid in pids for inode in _shm_inodes(pid)}
    return frozenset(str(path) for path, inode in _segments() if inode in inodes)


def all_shared_memory() -> frozenset[str]:
    """Every file in /dev/shm, whoever made it."""
    return frozenset(str(path) for path, _ in _segments())


def _segments() -> Iterable[tuple[Path, int]]:
    try:
        paths = list(_SHM.iterdir())
    except OSError:  # a machine without /dev/shm has no segments
        return
    for path in paths:
        with contextlib.suppress(OSError):
            yield path, path.lstat().st_ino


def _shm_inodes(pid: int) -> set[int]:
    found = set()
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
            if f" {_SHM}/" in line:  # address perms offset device inode path
                found.add(int(line.split(maxsplit=5)[4]))
    with contextlib.suppress(OSError):
        for link in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(f"{_SHM}/"):
                    found.add(link.stat().st_ino)
    return found


def unlink_shared_memory(names: Iterable[str], timeout_s: float = 3.0) -> None:
    """Remove segments of a run that is over: files of ours that no process has mapped any more.

    A process that is dying loses its environment, and with it the marker, before its memory: so
    what is still mapped is looked at again until the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        present = [Path(name) for name in names if Path(name).parent == _SHM and Path(name).exists()]
        in_use = shared_memory(_all_pids()) if present else frozenset()
        for path in present:
            with contextlib.suppress(OSError):
                if str(path) not in in_use and path.lstat().st_uid == os.geteuid():
                    path.unlink()
        if not any(str(path) in in_use for path in present) or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def scratch(run_id: str) -> Path:
    """A run's own TMPDIR: vLLM leaves a socket a process in the temporary directory, for ever.

    The name is short because a socket's path may have 107 bytes at most (unix(7)).
    """
    return Path(tempfile.gettempdir()) / f"{_SCRATCH}{run_id[:12]}"


def end_run(run_id: str, segments: Iterable[str], scratch_path: str) -> tuple[int, ...]:
    """End every process of a run and remove what it left; returns the processes that would not die."""
    survivors = sweep(run_id)
    unlink_shared_memory(segments)
    remove_scratch(scratch_path)
    return survivors


def remove_scratch(path: str) -> None:
    """Remove a run's temporary directory, and nothing that is none."""
    if Path(path).name.startswith(_SCRATCH):
        shutil.rmtree(path, ignore_errors=True)
