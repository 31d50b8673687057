"""Tensors on their way to an accelerator and back, beside what it computes: through pinned memory, on a stream of their own.

Only pinned memory is copied while the host goes on. It is dear to get and taken from the system, so there is little of
it, and it is used again and again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from camera.checkpoints.weights import is_finite
from camera.devices import pinned

_BUFFER_BYTES = 64 << 20


@dataclass(frozen=True)
class Uploaded:
    """Tensors on an accelerator, which a stream of their own has filled or will have filled."""

    tensors: dict[str, torch.Tensor]
    filled: Any
    """The stream's event."""
    finite: torch.Tensor
    """bool, of each tensor: whether no number is NaN or infinite; on the accelerator."""

    def take(self) -> dict[str, torch.Tensor]:
        """The tensors, for the stream that computes: it waits for them, the host does not."""
        device = self.finite.device
        stream = torch.get_device_module(device.type).current_stream(device)
        stream.wait_event(self.filled)
        for tensor in self.tensors.values():
            # Allocated for the other stream, it must not be given to another tensor before this one is done with it.
            tensor.record_stream(stream)
        return self.tensors


class Transfer:
    """One thread's way to an accelerator and back."""

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """Args:
        device: no CPU.
        buffer_bytes: of pinned memory; two of them.
        """
        self._module = torch.get_device_module(device.type)
        self._device = device
        self._stream = self._module.Stream(device)
        self._buffers = [pinned((buffer_bytes,), torch.uint8, device) for _ in range(2)]
        self._free = [self._module.Event() for _ in self._buffers]
        self._turn = 0

    def upload(self, tensors: Iterable[tuple[str, torch.Tensor, torch.dtype]]) -> Uploaded:
        """Begin to copy tensors to the accelerator.

        Args:
            tensors: the name of each, itself on the CPU, perhaps a map of its file, and the dtype that it is to have.
        """
        found, finite = {}, []
        with self._module.stream(self._stream):
            for name, tensor, dtype in tensors:
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                chunks = _bytes(tensor).split(len(self._buffers[0]))
                for target, chunk in zip(_bytes(whole).split(len(self._buffers[0])), chunks, strict=True):
                    buffer, free = self._next()
                    staged = buffer[: len(chunk)].copy_(chunk)
                    target.copy_(staged, non_blocking=True)
                    free.record(self._stream)
                found[name] = whole.to(dtype)
                finite.append(is_finite(whole))
            flags = torch.stack(finite) if finite else torch.empty(0, dtype=torch.bool, device=self._device)
            filled = self._module.Event()
            filled.record(self._stream)
        return Uploaded(found, filled, flags)

    def names_not_finite(self, uploaded: Uploaded) -> list[str]:
        """The tensors with NaN or infinity; waits for the copies, and for nothing that is computed."""
        with self._module.stream(self._stream):
            flags = uploaded.finite.cpu().tolist()
        return [name for name, finite in zip(uploaded.tensors, flags, strict=True) if not finite]

    def download(self, tensors: Mapping[str, torch.Tensor], ready: Any) -> dict[str, torch.Tensor]:
        """Copies on the CPU; waits for them, and for nothing that is computed after `ready`.

        Args:
            tensors: by name; those that are on the CPU are given back as they are.
            ready: the event, recorded by the stream that computes, after which they can be read.
        """
        found = {}
        with self._module.stream(self._stream):
            self._stream.wait_event(ready)
            for name, tensor in tensors.items():
                if tensor.device.type == "cpu":
                    found[name] = tensor
                    continue
                whole = torch.empty(tensor.shape, dtype=tensor.dtype)
                chunks = _bytes(tensor.contiguous()).split(len(self._buffers[0]))
                for target, chunk in zip(_bytes(whole).split(len(self._buffers[0])), chunks, strict=True):
                    buffer, free = self._next()
                    staged = buffer[: len(chunk)]
                    staged.copy_(chunk, non_blocking=True)
                    free.record(self._stream)
                    free.synchronize()
                    target.copy_(staged)
                found[name] = whole
        return found

    def _next(self) -> tuple[torch.Tensor, Any]:
        """A buffer that nothing is copied from or to any more, and the event to record when it is free again."""
        self._turn = 1 - self._turn
        self._free[self._turn].synchronize()
        return self._buffers[self._turn], self._free[self._turn]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def ready_event(device: torch.device) -> Any:
    """An event after all that was computed until now."""
    module = torch.get_device_module(device.type)
    event = module.Event()
    event.record(module.current_stream(device))
    return event
