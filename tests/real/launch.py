"""A program that runs a command and writes what it took: `python launch.py RESULT COMMAND …`; its exit code is the command's.

It is small itself: a process starts with the peak of the one that it was forked from, and pytest with torch in it is large.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

_EVERY_S = 0.2  # of the command itself the kernel tells the peak at its end


def main() -> None:
    result, *command = sys.argv[1:]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    ended = threading.Event()
    peaks: dict[int, int] = {}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    _, status, used = os.wait4(process.pid, 0)
    ended.set()
    watcher.join()
    peaks[process.pid] = max(peaks.get(process.pid, 0), used.ru_maxrss << 10)
    measured = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": max(peaks.values()),
        "code": os.waitstatus_to_exitcode(status),
    }
    Path(result).write_text(json.dumps(measured))


def _watch(root: int, peaks: dict[int, int], ended: threading.Event) -> None:
    """Note VmHWM of a process and all its descendants, by process."""
    while not ended.wait(_EVERY_S):
        try:
            family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            peaks[process.pid] = max(peaks.get(process.pid, 0), _peak_bytes(process.pid))


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
