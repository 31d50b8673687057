"""Bandwidth by copies that no cache holds: the limit that decoding is read against."""

from camera.device_check.context import Context
from camera.devices import copy_bandwidth, free_memory_bytes

_MOST_OF_FREE = 0.25
"""Of the free memory, for each of two buffers."""


def run(context: Context) -> None:
    """Copy a buffer of 4 GiB, or of a quarter of the free memory."""
    size = min(context.shapes.copied_bytes, int(free_memory_bytes(context.device) * _MOST_OF_FREE))
    context.measure("size of a copy", size, "B")
    context.measure("copy bandwidth", copy_bandwidth(context.device, size) / 1e9, "GB/s")
