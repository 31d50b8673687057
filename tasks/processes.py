"""Telling a process from a later one that got its pid."""

from pathlib import Path

import psutil

_PROC = Path("/proc")


def birth(pid: int) -> str | None:
    """What no other process with this pid has: which boot, and when since then; None if no such process runs.

    Not the time of day: a clock that is set would turn a living process into another.
    """
    if not psutil.pid_exists(pid):
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = _PROC / str(pid) / "stat"
        if not stat.exists():  # not Linux
            return str(process.create_time())
        ticks = (
            stat.read_text().rpartition(")")[2].split()[19]
        )  # field 22; the name may hold spaces and brackets
        return f"{(_PROC / 'sys/kernel/random/boot_id').read_text().strip()}:{ticks}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
