"""glibc's malloc tuned for work in equal rounds: freed blocks stay for the next round, fragments go back.

glibc hands a freed block back to the system and faults the pages of the next one in anew, zeroed: on a CPU 7 % of a
plain pass's time (docs/streaming.md). Set to keep blocks, it keeps too many: small ones that live on fence large ones
in, over 34 layers of a 7B model up to a gigabyte. So it keeps them, and is trimmed when the process has grown.
"""

import ctypes
from functools import cache

import psutil

LARGEST_BLOCK_BYTES = 32 << 20
"""The largest block that glibc takes from its heap (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits); others it maps singly."""
SLACK_BYTES = 2 * LARGEST_BLOCK_BYTES
"""How much larger than after its first round a process may be; blocks seldom fall into the holes of their like."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = (1 << 31) - 1


@cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None where the C library is another."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "malloc_trim") else None
    except (OSError, TypeError):  # Windows
        return None


@cache
def keep_freed_blocks() -> None:
    """From now on, freed blocks of up to `LARGEST_BLOCK_BYTES` stay with this process for its next ones."""
    if (libc := _libc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def trim() -> None:
    """Give all that is free in the heap back to the system."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


class SteadyHeap:
    """Work in equal rounds that needs the same memory in each, so that growth from round to round is fragments."""

    def __init__(self, slack_bytes: int = SLACK_BYTES) -> None:
        """Args:
        slack_bytes: how much larger than after its first round the process may be.
        """
        keep_freed_blocks()
        self._slack = slack_bytes
        self._limit: int | None = None

    def end_round(self) -> bool:
        """Trim the heap if the process has grown by more than the slack since its first round; whether it did."""
        own = private_bytes()
        self._limit = own + self._slack if self._limit is None else self._limit
        if own <= self._limit:
            return False
        trim()
        return True


def private_bytes() -> int:
    """Resident memory of this process that is no file's."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))
