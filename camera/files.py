"""Files and folders that are whole or absent: written to a hidden temporary sibling, fsynced, renamed into place.

A temporary is `.NAME.SPACE.PID.tmp`: hosts may share a disk, and whether a process runs is known on its own host
alone, so the name says which that is (`pid_space`). What killed writers left is removed by later ones.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from camera.disk import explain_disk_errors
from camera.errors import CameraError
from camera.held import opened
from camera.processes import pid_space, start_of

FOREIGN_DAYS = 7
"""How long a temporary of another host stays after its last change; as long as a writer there may be suspended."""
_TEMPORARY = re.compile(r"\..+?(?:\.(h[0-9a-f]{12}))?\.([0-9]+)\.tmp")
_BUFFER_BYTES = 8 << 20
_MAX_JSON_BYTES = 64 << 20
"""The index of a model in 1000 shards has a tenth of it."""
_MAX_JSON_VALUES = 8_000_000
"""A value takes up to 80 bytes of memory and two of a file; the largest tokenizer in use has three million."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""What a half of a surrogate pair begins with; most are whole pairs."""


def sync(path: Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and directory below a folder, then the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def temporary_sibling(path: Path) -> Path:
    """The hidden sibling that this process writes to before it becomes `path`."""
    return path.with_name(f".{path.name}.{pid_space()}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; when the block ends well it becomes `path`, else it is removed.

    Raises:
        DiskError: if the disk is full or cannot be written to.
    """
    temporary = temporary_sibling(path)
    try:
        with explain_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; when the block ends well it becomes `path`, else it is removed.

    Raises:
        CameraError: if `path` exists and is not an empty folder.
        DiskError: if the disk is full or cannot be written to.
    """
    refuse_occupied(path)
    temporary = temporary_sibling(path)
    try:
        with explain_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale_temporaries(path.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(working: Path, path: Path) -> None:
    """Make a finished working folder durable and rename it to `path`, which is absent or an empty folder."""
    sync_tree(working)
    if path.exists():
        path.rmdir()
    os.rename(working, path)
    sync(path.parent)


def hide(folder: Path) -> Path:
    """Rename a folder that is to be deleted, so that a kill meanwhile leaves no half of it under its name.

    Returns:
        What to delete: `.NAME.SPACE.PID.doomed`.
    """
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.{pid_space()}.{os.getpid()}.doomed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    return hidden


def remove_stale_temporaries(folder: Path, *, exclusive: bool = False) -> None:
    """Remove the temporaries that killed writers left directly in a folder.

    Those of a running process of this host stay, and those of another host that changed within FOREIGN_DAYS.

    Args:
        folder: is not searched deeper.
        exclusive: the caller holds the lock on all that is written here, so no writer of another host is at work.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and _is_stale(path, match[1] or pid_space(), int(match[2]), exclusive):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_stale(path: Path, space: str, pid: int, exclusive: bool) -> bool:
    if space == pid_space():
        return start_of(pid) is None
    return exclusive or time.time() - newest_change(path) > FOREIGN_DAYS * 86400


def newest_change(path: Path) -> float:
    """When a file, or a folder and all below it, last changed; the present for what is gone meanwhile."""
    times = []
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(each.lstat().st_mtime)
    return max(times, default=time.time())


def refuse_occupied(path: Path) -> None:
    """Raise CameraError if an output path exists with content: nothing is ever overwritten."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CameraError(f"{path} already exists and is not empty: choose another output path, or remove it")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented and with a final newline, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CameraError: if the file is missing, is not JSON (see `parse_json`), or holds more than any that is read here.
    """
    try:
        with opened(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > _MAX_JSON_BYTES:
                raise CameraError(
                    f"{path} has {size} bytes, and no JSON file of more than {_MAX_JSON_BYTES} is read"
                )
            return parse_json(file.read(_MAX_JSON_BYTES + 1))
    except FileNotFoundError:
        raise CameraError(f"{path} is missing") from None
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None
    except ValueError as error:  # no UTF-8, or no JSON
        raise CameraError(f"{path} is not valid JSON: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is none (NaN, infinity and halves of surrogate pairs are not), or has more values, digits or levels
            than any that is read here.
    """
    text = text if isinstance(text, str) else text.decode()
    if sum(map(text.count, ",[{")) > _MAX_JSON_VALUES:
        raise ValueError(f"more than {_MAX_JSON_VALUES} values")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if _HALF.search(text):  # half a character, which no file, database or digest can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("more levels than are read") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _finite(text: str) -> float:
    if (number := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"it holds a number beyond all that are computed with ({text[:20]})")
    return number


def reserve(descriptor: int, size: int) -> None:
    """Give an open file its final size, and the disk space for it where the file system can promise that.

    Raises:
        OSError: if there is no room.
    """
    os.ftruncate(descriptor, size)
    if size and hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def write_at(target: int, data: memoryview, offset: int) -> None:
    """Write all of some bytes to a place in an open file."""
    while data:
        written = os.pwrite(target, data, offset)
        data, offset = data[written:], offset + written


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file to a new one, or over one that is there.

    Raises:
        CameraError: if the source is held and is not what was hashed.
    """
    with opened(source) as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, _BUFFER_BYTES)


def copy_bytes(source: Path, offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy a range of a file into an open file, in the kernel where it can.

    Raises:
        CameraError: if the source ends before the range does.
    """
    with opened(source) as file:
        in_kernel = hasattr(os, "copy_file_range")  # Linux
        while count:
            copied = 0
            if in_kernel:
                try:
                    copied = os.copy_file_range(file.fileno(), target, count, offset, target_offset)
                except OSError as error:  # other file systems or kernels: through a buffer
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
                    in_kernel = False
                    continue
            else:
                copied = os.pwrite(
                    target, os.pread(file.fileno(), min(count, _BUFFER_BYTES), offset), target_offset
                )
            if copied == 0:
                raise CameraError(f"{source} ends {count} bytes too early: it was truncated while being read")
            count, offset, target_offset = count - copied, offset + copied, target_offset + copied
