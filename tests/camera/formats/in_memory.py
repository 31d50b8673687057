"""What the stages write to files by rows, for matrices and bytes in memory."""

from collections.abc import Mapping

import numpy as np
import torch

from camera.formats import blocks
from camera.options import BlockType
from camera.quantization.compensated_q4 import put_into, store_by_gptq
from camera.quantization.factor import Factor
from camera.quantization.methods.search import store_by_search
from camera.registry import BLOCK_FORMATS


def room(weight: torch.Tensor, type: str) -> np.ndarray:
    return np.empty((len(weight), BLOCK_FORMATS[type].row_bytes(weight.shape[1])), np.uint8)


def quantize_measured(weight: torch.Tensor, type: BlockType) -> tuple[np.ndarray, blocks.Squares]:
    """Bytes, and what was lost."""
    packed = room(weight, type)
    return packed, blocks.store(weight, type, put_into(packed))


def measure(weight: torch.Tensor, packed: np.ndarray, type: BlockType) -> blocks.Squares:
    """What was lost, from the bytes."""

    def work(chunk: torch.Tensor, start: int) -> blocks.Squares:
        stored = torch.empty(chunk.shape)
        blocks.decode(packed[start : start + len(chunk)], type, stored)
        return blocks.lost(chunk, stored)

    return blocks.sum_of(blocks.each_chunk(weight, work))


def quantize_by_search(
    weight: torch.Tensor, type: str, importance: torch.Tensor | None = None, *, name: str = "the tensor"
) -> np.ndarray:
    packed = room(weight, type)
    store_by_search(weight, type, put_into(packed), importance, name=name)
    return packed


def quantize_by_gptq(weights: Mapping[str, torch.Tensor], type: str, factor: Factor) -> dict[str, np.ndarray]:
    packed = {name: room(weight, type) for name, weight in weights.items()}
    store_by_gptq(weights, type, {name: put_into(data) for name, data in packed.items()}, factor)
    return packed
