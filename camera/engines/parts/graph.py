"""Work of a device that is recorded once and replayed: a CUDA graph, or the same on an NPU."""

from collections.abc import Callable
from typing import Any

import torch

GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
"""What records and replays work, in torch's module of each kind of device."""
FAILURES = (RuntimeError, NotImplementedError, AttributeError, ImportError, TypeError, ValueError)
"""What torch, its kernels, compilers and graphs raise where they cannot do something."""


class Graph:
    """What a function asks of a device, recorded once and replayed."""

    def __init__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        """Run it twice, as what is lazy must not be recorded, and record it.

        Args:
            run: launches work on tensors that stay where they are, and never waits for it.
            device: a CUDA or NPU device.
            pool: of another graph, whose memory is used too.

        Raises:
            RuntimeError: if the device cannot record it.
        """
        api: Any = torch.get_device_module(device.type)
        self._graph: Any = getattr(api, GRAPHS[device.type])()
        with api.device(device):
            side = api.Stream()
            side.wait_stream(api.current_stream())
            with api.stream(side):
                run()
                run()
            api.current_stream().wait_stream(side)
            with api.graph(self._graph, pool=pool):
                run()

    def __call__(self) -> None:
        self._graph.replay()

    @property
    def pool(self) -> Any:
        return self._graph.pool()
