"""What a run at work refers to, so that nothing of it is evicted between one step and the next.

<store>/.running/<name>   one key a line; held (flock) by the run, so that the kernel ends it with the run
<store>/.gate             held shared while a run names a key, alone while something is evicted
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tasks.store import Store

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def lease(store: Store) -> Iterator[Callable[[str], None]]:
    """Give a function that names a key as being in use; all named keys are so until the block ends.

    A key that is named before it is looked up is either evicted before the look, and then not found, or not at all.
    A store that cannot be written to needs no lease: nobody can evict anything there.
    """
    folder = store.root / ".running"
    path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _gate(store, fcntl.LOCK_SH):
            file = path.open("a", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        yield lambda key: None
        return

    def name(key: str) -> None:
        with _gate(store, fcntl.LOCK_SH):
            file.write(key + "\n")
            file.flush()

    try:
        with file:
            yield name
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def nothing_new(store: Store) -> Iterator[set[str]]:
    """Hold up whoever names a key, and give the keys that are in use now. For as short as can be."""
    with _gate(store, fcntl.LOCK_EX):
        yield _in_use(store)


def _in_use(store: Store) -> set[str]:
    keys: set[str] = set()
    for path in sorted((store.root / ".running").glob("*")):
        with suppress(FileNotFoundError), path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                keys.update(file.read().split())
            else:
                path.unlink(missing_ok=True)  # its run was killed
    return keys


@contextmanager
def _gate(store: Store, how: int) -> Iterator[None]:
    store.root.mkdir(parents=True, exist_ok=True)
    with (store.root / ".gate").open("w") as file:
        fcntl.flock(file, how)
        yield
