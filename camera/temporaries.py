"""Temporaries that writers make beside what they write: `.NAME.HOST.PID.tmp`, swept when their writer is gone.

Hosts may share a disk. Whether a process lives is known on its own host alone, so the name says which that is.
"""

import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

FOREIGN_DAYS = 7
"""How long a temporary of another host stays after the last change in it; as long as a writer there may be asleep."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_NAME = re.compile(r"\..+?(?:\.(h[0-9a-f]{12}))?\.([0-9]+)\.tmp")


@cache
def this_host() -> str:
    """Where a process number means this process: a digest that names no host.

    Of the boot and the PID namespace: hosts cloned from one image have the same machine id, containers of one host the
    same boot. After a restart all earlier temporaries are another host's. Where the kernel tells neither (it is not
    Linux), of the host's name and network address.
    """
    try:
        place = f"{_BOOT_ID.read_text().strip()} {os.readlink(_PID_NAMESPACE)}"
    except OSError:
        place = f"{platform.node()} {uuid.getnode()}"
    return "h" + hashlib.sha256(place.encode()).hexdigest()[:12]


def this_writer() -> str:
    """What tells this process from all others that may write to the same disk: `HOST.PID`."""
    return f"{this_host()}.{os.getpid()}"


def temporary_of(path: Path) -> Path:
    """The hidden sibling that this process writes to before it becomes `path`."""
    return path.with_name(f".{path.name}.{this_writer()}.tmp")


def sweep(folder: Path, *, alone: bool = False) -> None:
    """Remove the temporaries that killed writers left in a folder.

    Those of a process of this host that is alive stay, and those of another host in which anything changed within
    FOREIGN_DAYS. Names without a host, as they once were, count as this host's.

    Args:
        folder: is looked at itself; what is below it is not.
        alone: whether the caller holds the lock on all that is written here: then a writer on another host cannot be
            at work, and what it left goes at any age.
    """
    for path in folder.glob(".*.tmp"):
        match = _NAME.fullmatch(path.name)
        if match and _is_left(path, match[1] or this_host(), int(match[2]), alone):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_left(path: Path, host: str, process: int, alone: bool) -> bool:
    if host == this_host():
        return not _alive(process)
    return alone or time.time() - max(_changes(path), default=time.time()) > FOREIGN_DAYS * 86400


def _changes(path: Path) -> Iterator[float]:
    """When a file, or a folder and all below it, last changed; nothing of what is gone meanwhile."""
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            yield each.lstat().st_mtime


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process can have
        return False
    except PermissionError:
        return True
    return True
