"""Memory that a thread takes again for every chunk it works on."""

import threading
from math import prod

import torch


class Scratch(threading.local):
    """Buffers by name, each thread's its own. Memory asked of the system again for each chunk costs as much as packing it."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of this shape, with anything in it; it is overwritten by who next takes the same name."""
        count = prod(shape)
        held = self._held.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            held = self._held[name] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)
