"""Rounding to the nearest: each tensor alone, without calibration."""

import torch

from camera.quantization.method import Method, Packed, rounded_to_nearest
from camera.quantization.plan import PlannedTensor
from camera.registry import QUANTIZATION_METHODS


class RoundToNearest(Method):
    """As llama.cpp's own quantisation without an importance matrix."""

    calibrates = False

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        return rounded_to_nearest(tensor, weight, name)


QUANTIZATION_METHODS.register("rtn", RoundToNearest)
