"""Which file lies at a path, and when it changed, as far as its file system tells."""

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

_LOCAL = (
    "apfs",
    "bcachefs",
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "jfs",
    "overlay",
    "tmpfs",
    "xfs",
    "zfs",
)
"""File systems whose ctime can be relied on."""


class Identity(NamedTuple):
    """Which file it is, and when it changed; -1 for what is not compared."""

    device: int
    inode: int
    size: int
    changed_ns: int
    inode_changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def on(self, kind: str) -> "Identity":
        """What a file system of this kind keeps unchanged while nobody changes the file."""
        if kind in _LOCAL:
            return self
        inode = -1 if kind.startswith("fuse") else self.inode  # it may give a file another one at any time
        return Identity(-1, inode, self.size, self.changed_ns, -1)

    def like(self, other: "Identity") -> "Identity":
        """What of it is compared with another."""
        return Identity(*(-1 if theirs == -1 else ours for ours, theirs in zip(self, other, strict=True)))

    @property
    def is_sure(self) -> bool:
        return self.inode_changed_ns != -1


def identities(path: Path) -> tuple[Identity, Identity]:
    """Of the entry at a path, which may be a link, and of the file that it leads to.

    Raises:
        OSError: if nothing is there.
    """
    entry, file = Identity.of(os.lstat(path)), Identity.of(os.stat(path))
    return entry.on(_file_system(path.parent)), file.on(_file_system(path))


def _file_system(path: Path) -> str:
    """The type of the file system that a file or folder lies in, wherever links lead."""
    place, mounts = os.path.realpath(path), _mounts()
    while place not in mounts and place != os.path.dirname(place):
        place = os.path.dirname(place)
    return mounts.get(place, "apfs")


@cache
def _mounts() -> dict[str, str]:
    """Type of the file system by the place where it is mounted; empty where the system does not tell."""
    with suppress(OSError):
        return _mounts_of(Path("/proc/self/mountinfo").read_bytes())
    return {}


def _mounts_of(mountinfo: bytes) -> dict[str, str]:
    found = {}
    for line in filter(None, mountinfo.split(b"\n")):
        before, _, behind = line.partition(b" - ")
        place = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), before.split(b" ")[4])
        found[os.fsdecode(place)] = os.fsdecode(behind.split(b" ")[0])
    return found
