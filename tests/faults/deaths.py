"""A process that ends at a chosen file operation: by SIGKILL, or as after a power cut.

Python reports opens, renames, removals and the like to audit hooks just before they happen; fsync is reported here,
before and after. A kill leaves all that was written. A power cut leaves less: what no fsync made durable may be
missing, so just before the kill every such file is cut in half, and every rename that no fsync of its folder
followed is taken back.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link"}
_LOCKS = (".locks", ".running", ".gate")


@dataclass
class Deaths:
    """Counts the file operations below some folders, and ends the process at one of them."""

    folders: tuple[Path, ...]
    power: bool = False
    """Whether it is a power cut."""
    count: int = 0
    last: int | None = None
    """The operation to end at; None: only count."""
    _durable: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By inode, size and time of change of the files that are on the disk for sure."""
    _opened: set[Path] = field(default_factory=set)
    """Files that were opened for writing; the others are as they were, whatever time they bear."""
    _old: set[int] = field(default_factory=set)
    """Inodes of the files that were there before."""
    _renames: list[tuple[Path, Path, Path | None]] = field(default_factory=list)
    """From, to, and a second name of what was there before."""

    def watch(self) -> "Deaths":
        """Begin; there is no end but that of the process."""
        self._old = {path.stat().st_ino for path in self._files()}
        real = os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._happens(path)
            real(descriptor)
            self._synced(path)
            self._happens(path)

        os.fsync = fsync
        sys.addaudithook(self._hear)
        return self

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(os.path.abspath(arguments[0]))
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._happens(path)
        if event == "open":
            self._opened.add(path)
        if event == "os.rename" and self._is_ours(path):
            to = Path(os.path.abspath(arguments[1]))
            kept = None
            if self.power and to.is_file():
                kept = self.folders[0].parent / f"kept-{self.count}"
                os.link(to, kept)
            self._renames.append((path, to, kept))

    def _happens(self, path: Path) -> None:
        if not self._is_ours(path):
            return
        self.count += 1
        if self.last is not None and self.count >= self.last:
            self.last = None  # what follows is ours
            if self.power:
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_ours(self, path: Path) -> bool:
        return any(
            path.is_relative_to(folder) and not set(_LOCKS) & set(path.relative_to(folder).parts)
            for folder in self.folders
        )

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self._renames = [rename for rename in self._renames if rename[1].parent != path]
        elif path.exists():
            self._durable[path.stat().st_ino] = _state(path)

    def _lose(self) -> None:
        """Make the folders what a power cut may leave of them."""
        for path in self._files():
            inode = path.stat().st_ino
            if inode in self._old and path not in self._opened:
                continue
            if self._durable.get(inode) != _state(path):
                path.chmod(0o644)
                os.truncate(path, path.stat().st_size // 2)
        for source, to, kept in reversed(self._renames):
            if to.exists() and not source.exists():
                os.rename(to, source)
                if kept is not None:
                    os.rename(kept, to)

    def _files(self) -> list[Path]:
        return [
            path
            for folder in self.folders
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink() and self._is_ours(path)
        ]


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def operations_of(folder: Path, act: Callable[[], object]) -> int:
    """How many operations an act below a folder takes. Call in a process of its own."""
    deaths = Deaths((folder,)).watch()
    act()
    return deaths.count
