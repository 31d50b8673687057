"""Memory maps of files, whose pages count as a process's memory once they were read."""

import mmap

import numpy as np


def release_pages(part: np.ndarray) -> None:
    """Let the system drop the pages of a read-only map that an array lies in; they are read anew when touched.

    Does nothing for an array in memory of its own.
    """
    owner: object = part
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not part.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = part.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, first, start - first + part.nbytes)
