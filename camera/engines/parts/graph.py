"""Work of a device that is recorded once and replayed: a CUDA graph, or the same on an NPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch

GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
"""What records and replays work, in torch's module of each kind of device."""
FAILURES = (Exception,)
"""What trying a kernel, a compiler or a graph may raise; compilers' errors have no narrower base in common."""
_COMPILED_SHAPES = 256


def compile_many_shapes() -> None:
    """Let torch.compile keep as many shapes of one function as several models in one process have.

    With its own limit of 8 the ninth would run as it is, without a word. Forgetting the others is no way out: recorded
    graphs still launch what was compiled for them.
    """
    import torch._dynamo.config as compiler  # starts the compiler's machinery, which few runs need

    compiler.recompile_limit = max(compiler.recompile_limit, _COMPILED_SHAPES)
    compiler.accumulated_recompile_limit = max(compiler.accumulated_recompile_limit, 4 * _COMPILED_SHAPES)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """Where a device's graphs are recorded; torch's own is of whichever device was the first to record."""
    return torch.get_device_module(device.type).Stream(device)


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
            side = _side_stream(device)
            side.wait_stream(api.current_stream())
            with api.stream(side):
                run()
                run()
            api.current_stream().wait_stream(side)
            with api.graph(self._graph, pool=pool, stream=side):
                run()

    def __call__(self) -> None:
        self._graph.replay()

    @property
    def pool(self) -> Any:
        return self._graph.pool()
