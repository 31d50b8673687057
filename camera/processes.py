"""Process identity: which process on which host, also where hosts share a disk and pids are used again."""

import hashlib
import os
import platform
import uuid
from functools import cache
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


@cache
def pid_space() -> str:
    """Where a pid means the same process: a digest of the boot and the PID namespace, which names no host.

    Hosts cloned from one image share a machine id, and containers of one host its boot. After a restart all earlier
    processes are another space's. Where the kernel tells neither (not Linux), of the host's name and network address.
    """
    try:
        place = f"{_BOOT_ID.read_text().strip()} {os.readlink(_PID_NAMESPACE)}"
    except OSError:
        place = f"{platform.node()} {uuid.getnode()}"
    return "h" + hashlib.sha256(place.encode()).hexdigest()[:12]


def start_of(pid: int) -> str | None:
    """Boot and clock ticks since then at which a process started: no other with this pid has them; None if none runs.

    Not the time of day: setting the clock would turn a living process into another.
    """
    try:
        if not psutil.pid_exists(pid) or (process := psutil.Process(pid)).status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists():  # not Linux
            return str(process.create_time())
        fields = (
            stat.read_text().rpartition(")")[2].split()
        )  # the name before it may hold spaces and brackets
        return f"{_BOOT_ID.read_text().strip()}:{fields[19]}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, OverflowError):
        return None


def process_identity() -> str:
    """`HOST PID START` of this process, to record where it must be recognised after it has ended."""
    return f"{platform.node()} {os.getpid()} {start_of(os.getpid())}"


def has_ended(identity: str) -> bool:
    """Whether the process of a recorded identity ran on this host and does not run any more."""
    host, _, rest = identity.partition(" ")
    pid, _, started = rest.partition(" ")
    return host == platform.node() and pid.isdecimal() and start_of(int(pid)) != started
