"""Files that are either whole or not there: written to a temporary sibling, fsynced, renamed into place."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from camera.disk import told_of_disks
from camera.errors import CameraError
from camera.temporaries import sweep, temporary_of, this_host, this_writer

_BUFFER_BYTES = 8 << 20
_MAX_JSON_BYTES = (
    64 << 20
)  # as objects it is many times that; the index of a model in 1000 shards has a tenth of it


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
    """Give a temporary sibling to write to; when the block ends well it becomes `path`, else it is removed.

    Raises:
        DiskError: if the disk is full or cannot be written to.
    """
    temporary = temporary_of(path)
    try:
        with told_of_disks(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
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
        DiskError: if the disk is full or cannot be written to.
    """
    refuse_occupied(path)
    temporary = temporary_of(path)
    try:
        with told_of_disks(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
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


class TakenError(CameraError):
    """Another process is making the same output."""


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only one who makes an output path. The kernel frees it when its holder dies, however that happens.

    Args:
        path: what will be made; the lock is `.<name>.lock` beside it, and goes when the block ends.
        wait: for the other one to end; else it is an error that there is one.

    Raises:
        TakenError: if another process is making it.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TakenError(
                    f"{path} is being made by another process{_holder(file)}: wait until it ends, or choose another place"
                ) from None
            if not is_still(file, lock):  # its holder ended, and took its name along
                continue
            try:
                file.truncate(0)
                file.write(this_writer())
                file.flush()
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def is_still(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as it wrote there; nothing while it writes."""
    file.seek(0)
    host, _, number = file.read(40).rpartition(".")
    if not number.isdigit():
        return ""
    return f" ({number})" if host == this_host() else f" ({number}, on another host)"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented and with a final newline, as a whole file."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CameraError: if the file is missing, is not JSON, or is larger than any that is read here.
    """
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise CameraError(
                f"{path} has {size} bytes, and no JSON file of more than {_MAX_JSON_BYTES} is read"
            )
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
