"""Rounding to the nearest: each tensor alone, without calibration."""

from camera.checkpoints.rows import Rows
from camera.formats.blocks import Put
from camera.quantization.method import Method, Stored
from camera.quantization.plan import PlannedTensor
from camera.registry import QUANTIZATION_METHODS


class RoundToNearest(Method):
    """As llama.cpp's own quantisation without an importance matrix."""

    calibrates = False

    def store(self, tensor: PlannedTensor, rows: Rows, put: Put, name: str) -> Stored:
        return self.round_to_nearest(tensor, rows, put, name)


QUANTIZATION_METHODS.register("rtn", RoundToNearest)
