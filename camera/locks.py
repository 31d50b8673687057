"""Locks between processes and threads: `flock` on a small file, which the kernel frees when its holder dies."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from camera.errors import CameraError
from camera.processes import pid_space


class LockedError(CameraError):
    """Another process holds the lock."""

    def __init__(self, message: str, holder: str = "") -> None:
        self.holder = holder
        """Its pid in brackets, where it noted it."""
        super().__init__(message)


@contextmanager
def lock(
    path: Path,
    *,
    shared: bool = False,
    wait: bool = True,
    waiting: Callable[[], None] = lambda: None,
    keep: bool = False,
) -> Iterator[IO[str]]:
    """Hold a lock file, open for reading and appending; it is removed at the end.

    Args:
        path: the lock file; made if it is missing, with its folder.
        shared: with others that hold it shared.
        wait: until it is free.
        waiting: called before waiting.
        keep: leave the file where it is, for a lock that many hold shared.

    Raises:
        LockedError: if another holds it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    holder = _holder(file)
                    raise LockedError(f"{path} is locked by another process{holder}", holder) from None
                waiting()
                fcntl.flock(file, how)
            if not _is_named(file, path):  # its last holder removed it, and others lock a new one
                continue
            try:
                yield file
            finally:
                if not keep:
                    path.unlink(missing_ok=True)
            return


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock file if nobody does, and remove it at the end; gives whether it is held now."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(path, wait=False))
            free = True
        except LockedError:
            free = False
        yield free


@contextmanager
def output_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that makes an output path; the lock is `.NAME.lock` beside it.

    Raises:
        LockedError: if another process makes it and `wait` is false.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(lock(path.with_name(f".{path.name}.lock"), wait=wait))
        except LockedError as error:
            raise LockedError(
                f"{path} is being made by another process{error.holder}: wait until it ends, or choose another place"
            ) from None
        file.truncate(0)
        file.write(f"{pid_space()}.{os.getpid()}")
        file.flush()
        yield


def _is_named(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as `output_lock` notes it; nothing for others, or while it is written."""
    file.seek(0)
    host, _, pid = file.read(40).rpartition(".")
    if not pid.isdigit():
        return ""
    return f" ({pid})" if host == pid_space() else f" ({pid}, on another host)"
