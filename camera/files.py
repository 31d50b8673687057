"""Files that are either whole or not there: written to a temporary sibling, fsynced, renamed into place."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from camera.errors import CameraError

_BUFFER_BYTES = 8 << 20


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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; when the block ends well it becomes `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; when the block ends well it becomes `path`, else it is removed.

    Raises:
        CameraError: if `path` exists and is not an empty folder.
    """
    refuse_occupied(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(path: Path) -> None:
    """Raise CameraError if an output path exists with content: nothing is ever overwritten."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CameraError(f"{path} already exists and is not empty: choose another output path, or remove it")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented and with a final newline, as a whole file."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CameraError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CameraError(f"{path} is missing") from None
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers or nesting beyond reason
        raise CameraError(f"{path} is not valid JSON: {error}") from None


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


def copy_bytes(source: Path, offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy a range of a file into an open file, in the kernel where it can.

    Raises:
        CameraError: if the source ends before the range does.
    """
    with source.open("rb") as file:
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


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder: temporaries of `whole_file` and `whole_folder`.

    Those of a process that is alive stay.
    """
    for path in folder.glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and not _alive(int(owner)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
