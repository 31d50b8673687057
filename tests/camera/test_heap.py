"""The C library's heap: kept from round to round, trimmed when it has grown."""

import platform
import resource
import subprocess
import sys

import pytest

from camera.heap import SLACK_BYTES

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc keeps a heap that can be steered and trimmed"
)

HOARD = """
large, small = [], []
for _ in range({count}):
    large.append(torch.ones(2_000_000))  # 8 MB
    small.append(torch.ones(25_000))  # lives on, and fences the block before it in
large.clear()
"""


def said_by(script: str) -> str:
    """What a script prints that runs in a process of its own: the heap of this one has holes from other tests."""
    begun = "import resource, torch\nfrom camera import devices, heap\n"
    return subprocess.run(
        [sys.executable, "-c", begun + script], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_released_memory_goes_back_to_the_system() -> None:
    given_back = said_by(
        "heap.keep_freed_blocks()\n" + HOARD.format(count=40) + "before = heap.private_bytes()\n"
        "devices.release_memory(torch.device('cpu'))\n"
        "print(before - heap.private_bytes())"
    )
    assert int(given_back) > 100e6


def test_steady_rounds_use_the_same_pages() -> None:
    faults = said_by(
        """
steady = heap.SteadyHeap()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [torch.ones(5_000_000) for _ in range(4)]  # 20 MB each
    del blocks
    steady.end_round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    )
    pages = 4 * 20_000_000 // resource.getpagesize()
    assert int(faults) < 5 * pages  # of 20 rounds; the first few grow until every block finds a hole


def test_a_heap_that_has_grown_is_trimmed() -> None:
    kept, trimmed, left = said_by(
        "steady = heap.SteadyHeap()\n"
        "warm = [torch.ones(2_000_000) for _ in range(2)]; del warm\n"
        "print(steady.end_round())\n"
        "before = heap.private_bytes()\n" + HOARD.format(count=20) + "print(steady.end_round())\n"
        "print(heap.private_bytes() - before)"
    ).split()
    assert (kept, trimmed) == ("False", "True")
    assert int(left) < SLACK_BYTES
