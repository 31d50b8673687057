"""Someone who changes a source while it is read, and puts it back so that every name, byte and time of change is as it was."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self


class Deceit(ABC):
    """One way to do it, with one file of a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.path = folder, folder / name

    @abstractmethod
    def swap(self) -> Self:
        """Make the file another."""

    @abstractmethod
    def restore(self) -> None:
        """Put it back."""

    @property
    def other(self) -> bytes:
        """Bytes of the same length, of which one bit differs: in a weight, or in a number of JSON."""
        data = bytearray(self.path.read_bytes())
        at = data.rindex(b"1") if data.count(b"1") and len(data) < 4096 else len(data) - 2
        data[at] ^= 1
        return bytes(data)


class InPlace(Deceit):
    """Written to, with its time of change set back."""

    def swap(self) -> Self:
        self.before, self.times = self.path.read_bytes(), os.stat(self.path)
        self._write(self.other)
        return self

    def restore(self) -> None:
        self._write(self.before)

    def _write(self, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.write(data)
        os.utime(self.path, ns=(self.times.st_atime_ns, self.times.st_mtime_ns))


class Renamed(Deceit):
    """Another file under its name."""

    def swap(self) -> Self:
        other, times = self.other, os.stat(self.path)
        self.aside = self.path.rename(self.folder / ".aside")
        self.path.write_bytes(other)
        os.utime(self.path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return self

    def restore(self) -> None:
        self.aside.replace(self.path)


class Linked(Deceit):
    """A link under its name."""

    def swap(self) -> Self:
        (self.folder / ".other").write_bytes(self.other)
        self.aside = self.path.rename(self.folder / ".aside")
        self.path.symlink_to(".other")
        return self

    def restore(self) -> None:
        self.aside.replace(self.path)
        (self.folder / ".other").unlink()


class FolderSwapped(Deceit):
    """Another folder under the name of one that it is in: the files themselves are not touched."""

    levels = 1

    def swap(self) -> Self:
        other = self.other
        place = self.path.parents[self.levels]
        copy = place.with_name(".copy")
        shutil.copytree(place, copy, symlinks=True)
        (copy / self.path.relative_to(place)).write_bytes(other)
        self.place, self.aside = place, place.rename(place.with_name(".aside"))
        copy.rename(place)
        return self

    def restore(self) -> None:
        shutil.rmtree(self.place)
        self.aside.rename(self.place)


DECEITS: dict[str, type[Deceit]] = {
    "in place": InPlace,
    "renamed": Renamed,
    "linked": Linked,
    "folder above": FolderSwapped,
}


@contextmanager
def while_swapped(deceit: str, folder: Path, name: str) -> Iterator[None]:
    """The file is another while the block runs."""
    active = DECEITS[deceit](folder, name).swap()
    try:
        yield
    finally:
        active.restore()
