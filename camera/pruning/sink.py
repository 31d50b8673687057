"""Where the decisions of a prune go: into the model that is being written, at once or in a thread behind the layers.

On a CPU the layers that compute need the cores, so a layer is written before the next begins. Beside an accelerator the CPU
is free: a thread takes what stays of a layer, sliced on the accelerator from the matrices that it had there, writes it, and
waits for the disk, while the next layers compute.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from camera.devices import use_device
from camera.layerwise.transfer import Transfer, ready_event
from camera.pruning.behind import Behind
from camera.pruning.decision import Decision, Stays
from camera.pruning.model_writer import ModelWriter


class Sink(Protocol):
    """Where the decisions of a run go."""

    @property
    def slices(self) -> bool:
        """Whether it takes slices of matrices that an accelerator has."""

    def sync(self) -> None:
        """Make durable all that it was given; called in a thread, before a state counts."""


class NoSink:
    """Nothing is done with decisions that a state would have to wait for."""

    slices = False

    def sync(self) -> None:
        """Nothing."""


class ModelSink:
    """A model, written layer by layer by whoever calls."""

    slices = False

    def __init__(self, writer: ModelWriter, durable: Callable[[], None]) -> None:
        """Args:
        writer: of the model.
        durable: called when all that was written until then is on the disk.
        """
        self._writer = writer
        self._durable = durable

    def take(self, decision: Decision) -> None:
        """Write a layer, or count it as written by the run that this one resumes."""
        if decision.resumed:
            self._writer.already_written(decision.layer)
        else:
            self._writer.write(decision.layer, decision.stays())

    def sync(self) -> None:
        """See `Sink`."""
        self._writer.sync()
        self._durable()

    def finish(self) -> None:
        """Write all that is no decoder layer's, and close the model."""
        self._writer.write_rest()
        self._writer.finish()

    def close(self) -> None:
        """Leave the model as it is, finished or to be resumed."""
        self._writer.abandon()


class SinkBehind(ModelSink):
    """A model, written by a thread behind an accelerator."""

    slices = True

    def __init__(self, writer: ModelWriter, durable: Callable[[], None], device: torch.device) -> None:
        """Args:
        writer, durable: see `ModelSink`.
        device: the accelerator.
        """
        super().__init__(writer, durable)
        self._device = device
        self._transfer = Transfer(device)
        self._behind = Behind(partial(use_device, device))
        self._behind.submit(writer.write_outside_layers)

    def take(self, decision: Decision) -> None:
        """Have a layer written.

        Raises:
            Exception: what an earlier one raised.
        """
        if decision.resumed:
            self._behind.submit(self._writer.already_written, decision.layer)
        else:
            ready = ready_event(self._device)
            self._behind.submit(self._write, decision.layer, decision.stays(), ready)

    def sync(self) -> None:
        """See `Sink`."""
        self._behind.do(super().sync)

    def finish(self) -> None:
        """See `ModelSink`."""
        self._behind.do(super().finish)

    def close(self) -> None:
        """See `ModelSink`."""
        self._behind.close()
        super().close()

    def _write(self, layer: int, stays: Stays, ready: Any) -> None:
        matrices = self._transfer.download(stays.matrices, ready)
        self._writer.write(layer, replace(stays, matrices=matrices))
        self._writer.sync()  # here nobody waits for the disk, at the end everybody would


def model_sink(writer: ModelWriter, durable: Callable[[], None], device: torch.device) -> ModelSink:
    """The sink that suits a device."""
    return ModelSink(writer, durable) if device.type == "cpu" else SinkBehind(writer, durable, device)
