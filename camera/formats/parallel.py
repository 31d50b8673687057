"""Chunks of a tensor worked on side by side, in memory that each thread takes again for every chunk."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from math import prod
from threading import Barrier, local
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST_THREADS = 16
"""Each holds a chunk in several forms, and between operations they wait for one interpreter."""


def map_chunks(work: Callable[[int], T], starts: Iterable[int]) -> list[T]:
    """Call `work` with every start, on as many threads as torch uses (16 at most); the results in order.

    Each call computes on one core. torch's own threads wait for each other at the end of every operation, and operations
    here take a millisecond: if another program holds a core, nearly all the time is waiting. Inference mode holds in the
    threads as where it was called; torch keeps it by thread.

    Raises:
        what `work` raises; of several, the first in order.
    """
    starts = list(starts)
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if min(threads, len(starts)) < 2:
        return [work(start) for start in starts]
    inference = torch.is_inference_mode_enabled()

    def as_here(start: int) -> T:
        with torch.inference_mode(inference):
            return work(start)

    futures = [_pool(threads, os.getpid()).submit(as_here, start) for start in starts]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # what they write to may be gone afterwards


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay, with their scratch memory: to start them costs as much as to pack a small expert. They are those of
    one process; a forked one has none of its parent's."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="chunks")
    _compute_alone(pool, threads)
    return pool


def _compute_alone(pool: ThreadPoolExecutor, threads: int) -> None:
    """Make torch use one core for each operation in the threads of a pool, and as many as before elsewhere."""
    before = torch.get_num_threads()
    all_here = Barrier(threads)

    def alone() -> None:
        all_here.wait()
        torch.get_num_threads()  # a thread's first question takes the process's number, and would undo the next line
        # Holds in this thread, but is also what threads new to torch start with, until it is set again below.
        torch.set_num_threads(1)

    for future in [pool.submit(alone) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(before)


class Scratch(local):
    """Buffers by name, each thread's its own. Memory asked of the system again for each chunk costs as much as packing it."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of this shape, with anything in it; it is overwritten by who next takes the same name."""
        count = prod(shape)
        held = self._held.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            with torch.inference_mode(False):  # one made in it could not be written to outside
                held = self._held[name] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)
