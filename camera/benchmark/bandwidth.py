"""How fast a device reads memory: the limit of batch-1 decoding, which reads every weight for every token."""

from time import perf_counter

import torch

from camera.devices import free_memory_bytes, release_memory, synchronize

BUFFER_BYTES = 512 << 20
"""Enough to leave no part of note in the caches."""
_TRIES = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of summing a large float32 tensor, the best of five tries, with torch's current threads."""
    count = min(BUFFER_BYTES, free_memory_bytes(device) // 4) // 4
    tensor = torch.ones(count, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(_TRIES):
        synchronize(device)
        start = perf_counter()
        tensor.sum()
        synchronize(device)
        best = max(best, tensor.nbytes / (perf_counter() - start))
    del tensor
    release_memory(device)
    return best
