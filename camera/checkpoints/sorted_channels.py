"""A checkpoint seen with its FFN channels in another order, which is the same model.

Channel j of a feed-forward network is row j of gate and up and column j of down. Any order of the channels gives the
same sum, so it is free to choose. A block of 4-bit weights is some consecutive columns of a row of down under one scale, and
loses least of its weights where they are of one size. What that does to the output: docs/quantization.md.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property

import torch

from camera.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class SortedChannels(Checkpoint):
    """A checkpoint whose feed-forward matrices are read with the channels in descending order of size: the root mean
    square of their down column, of equals the first first. All else is the folder's, `load_model` too."""

    _orders: dict[int, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "SortedChannels":
        """The sorted view of a checkpoint; a sorted one as it is."""
        if isinstance(checkpoint, cls):
            return checkpoint
        return cls(**{each.name: getattr(checkpoint, each.name) for each in fields(Checkpoint)})

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU; a feed-forward matrix as a copy in the new order.

        Raises:
            CameraError: if the checkpoint has no such tensor or its file cannot be read.
        """
        tensor = super().read(name)
        if name not in self._channels:
            return tensor
        layer, dimension = self._channels[name]
        return tensor.index_select(dimension, self.order(layer))

    def order(self, layer: int) -> torch.Tensor:
        """int64 [F]: for each place, which channel of the folder's stands there."""
        if layer not in self._orders:
            down_HF = super().read(self.family.ffn_names(layer)[2])
            size_F = torch.stack([rows.double().square().sum(0) for rows in down_HF.split(256)]).sum(0)
            self._orders[layer] = size_F.argsort(descending=True, stable=True)
        return self._orders[layer]

    def sort_columns(self, name: str, values_I: torch.Tensor) -> torch.Tensor:
        """What belongs to the columns of a matrix in the folder, in the order of the columns as they are read."""
        layer, dimension = self._channels.get(name, (0, 0))
        return values_I[self.order(layer)] if dimension == 1 else values_I

    @cached_property
    def _channels(self) -> dict[str, tuple[int, int]]:
        """Of each feed-forward matrix its layer, and the dimension that its channels are."""
        return {
            name: (layer, dimension)
            for layer in range(self.layer_count)
            for name, dimension in zip(self.family.ffn_names(layer), (0, 0, 1), strict=True)
        }
