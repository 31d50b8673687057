"""Leases: the keys that a run at work refers to, so that none is evicted between one step and the next.

<store>/.running/<name>   one key a line; locked by the run, so that the kernel ends the lease with the run
<store>/.gate             locked shared while a run adds a key, exclusively while artifacts are evicted
"""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from camera.locks import lock, try_lock
from tasks.store import Store


@contextmanager
def lease(store: Store) -> Iterator[Callable[[str], None]]:
    """Give a function that adds a key to this run's lease, which ends with the block.

    A key that is added before it is looked up is either evicted before that, and then not found, or not at all. A
    read-only store needs no lease: nobody can evict anything there.
    """
    if not store.is_writable():
        yield lambda key: None
        return
    with lock(store.root / ".running" / f"{os.getpid()}-{uuid.uuid4().hex[:8]}") as file:

        def add(key: str) -> None:
            with _gate(store, shared=True):
                file.write(key + "\n")
                file.flush()

        yield add


@contextmanager
def eviction_lock(store: Store) -> Iterator[set[str]]:
    """Keep runs from adding keys to their leases, and give the keys that are leased. Hold it briefly."""
    with _gate(store, shared=False):
        keys: set[str] = set()
        for path in sorted((store.root / ".running").glob("*")):
            with try_lock(path) as run_was_killed, suppress(FileNotFoundError):
                if not run_was_killed:
                    keys.update(path.read_text(encoding="utf-8").split())
        yield keys


@contextmanager
def _gate(store: Store, *, shared: bool) -> Iterator[IO[str]]:
    with lock(store.root / ".gate", shared=shared, keep=True) as file:
        yield file
