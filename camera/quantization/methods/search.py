"""Scales searched for the calibration tokens, by the second moment of each input."""

import numpy as np
import torch

from camera.checkpoints.rows import Rows
from camera.formats import blocks
from camera.formats.blocks import Put, Squares, as_rows
from camera.quantization.method import Method, Stored
from camera.quantization.plan import PlannedTensor
from camera.quantization.q4 import is_q4, nearest_codes, pack
from camera.quantization.scales import best_scales
from camera.registry import BLOCK_FORMATS, QUANTIZATION_METHODS

_CHUNK_WEIGHTS = 1 << 18
"""Weights searched at once: every operand of the inner loop stays in the cache."""


class Search(Method):
    """Scales by an importance matrix; matrices that it does not know are searched with equal weights."""

    reads_imatrix = True

    def store(self, tensor: PlannedTensor, rows: Rows, put: Put, name: str) -> Stored:
        if not is_q4(tensor.type):
            return self.round_to_nearest(tensor, rows, put, name)
        return store_by_search(
            rows, tensor.type, put, self.calibration.imatrix.importance(tensor.name), name=name
        )


def store_by_search(
    rows: Rows, type: str, put: Put, importance: torch.Tensor | None = None, *, name: str = "the tensor"
) -> Stored:
    """Numbers to blocks with the scales of `best_scales`; never more weighted error than `blocks.store`, nor more memory.

    Args:
        rows: [rows, row_length], any floating dtype.
        type: `q4_0` or `q4_0_64`.
        put: takes the bytes; see `blocks.store`.
        importance: [row_length], not negative: the second moment of each column's input; None weighs all alike.
        name: of the tensor, for messages.

    Raises:
        CameraError: as `blocks.quantize`.
    """
    form, width = BLOCK_FORMATS[type], rows.shape[1]
    length = form.block_length
    weights = _block_weights(importance, width, length)

    def work(chunk: torch.Tensor, start: int) -> tuple[Squares, Squares]:
        exact = chunk.detach().cpu().float().contiguous()
        data = np.empty((len(exact), form.row_bytes(width)), np.uint8)
        blocks.encode(form, exact, data, name=name)  # refuses what no block can hold
        by_block = exact.view(-1, width // length, length)
        scales = best_scales(by_block, weights)
        data = pack(nearest_codes(by_block, scales).view(-1, width), scales, type)
        put(start, data)
        stored = torch.empty_like(exact)
        blocks.decode(data, type, stored)
        weighted = _weighted(exact, stored, importance)
        return blocks.lost(exact, stored), weighted

    parts = blocks.each_chunk(as_rows(rows, type, name), work, _CHUNK_WEIGHTS)
    weighted = blocks.sum_of(part for _, part in parts)
    error = (weighted.noise / weighted.power) ** 0.5 if weighted.power > 0 else 0.0
    return Stored(blocks.sum_of(part for part, _ in parts), None if importance is None else error)


def _weighted(exact: torch.Tensor, stored: torch.Tensor, importance: torch.Tensor | None) -> Squares:
    """Σ m·w² and Σ m·(stored − w)² over some rows, m being the second moment of a column's input."""
    if importance is None:
        return Squares(0.0, 0.0)
    moments = importance.detach().cpu().double()
    delta = (stored - exact).double().square_().sum(0)
    return Squares(float(exact.double().square_().sum(0) @ moments), float(delta @ moments))


def _block_weights(importance: torch.Tensor | None, row_length: int, length: int) -> torch.Tensor:
    """[blocks in a row, L]; a block whose inputs were never anything weighs its columns alike."""
    if importance is None:
        return torch.ones(row_length // length, length)
    weights = importance.detach().cpu().float().reshape(-1, length)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)


QUANTIZATION_METHODS.register("search", Search)
