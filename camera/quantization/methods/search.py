"""Scales searched for the calibration tokens, by the second moment of each input."""

import numpy as np
import torch

from camera.formats import blocks
from camera.quantization.method import Method, Packed, rounded_to_nearest
from camera.quantization.plan import PlannedTensor
from camera.quantization.q4 import error_by_squares, is_q4, nearest_codes, pack_rows
from camera.quantization.scales import best_scales
from camera.registry import BLOCK_FORMATS, QUANTIZATION_METHODS

_CHUNK_WEIGHTS = 1 << 18
"""Weights searched at once: every operand of the inner loop stays in the cache."""


class Search(Method):
    """Scales by an importance matrix; matrices that it does not know are searched with equal weights."""

    reads_imatrix = True

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        if not is_q4(tensor.type):
            return rounded_to_nearest(tensor, weight, name)
        importance = self.calibration.imatrix.importance(tensor.name)
        data = quantize_by_search(weight, tensor.type, importance, name=name)
        if importance is None:
            return Packed(data)
        stored = torch.from_numpy(blocks.dequantize(data, tensor.type, weight.shape[1]))
        return Packed(data, error_by_squares(weight.float(), stored, importance))


def quantize_by_search(
    weight: torch.Tensor, type: str, importance: torch.Tensor | None = None, *, name: str = "the tensor"
) -> np.ndarray:
    """Numbers to blocks with the scales of `best_scales`; never more weighted error than `blocks.quantize`.

    Args:
        weight: [rows, row_length], any floating dtype.
        type: `q4_0` or `q4_0_64`.
        importance: [row_length], not negative: the second moment of each column's input; None weighs all alike.
        name: of the tensor, for messages.

    Returns:
        uint8 [rows, bytes per row].

    Raises:
        CameraError: as `blocks.quantize`.
    """
    length, row_length = BLOCK_FORMATS[type].block_length, weight.shape[1]
    weights = _block_weights(importance, row_length, length)

    def rounding(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = rows.reshape(-1, row_length // length, length)
        scales = best_scales(chunk, weights)
        return nearest_codes(chunk, scales).reshape(-1, row_length), scales

    return pack_rows(weight, type, rounding, max(1, _CHUNK_WEIGHTS // row_length), name=name)


def _block_weights(importance: torch.Tensor | None, row_length: int, length: int) -> torch.Tensor:
    """[blocks in a row, L]; a block whose inputs were never anything weighs its columns alike."""
    if importance is None:
        return torch.ones(row_length // length, length)
    weights = importance.detach().cpu().float().reshape(-1, length)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)


QUANTIZATION_METHODS.register("search", Search)
