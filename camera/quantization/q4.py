"""Codes and scales of Q4_0 and Q4_0_64, and the bytes that hold them.

A block is weights w_j ≈ d·q_j: one fp16 scale d of either sign, and codes q_j from −8 to 7 (docs/formats.md).
"""

import numpy as np
import torch

from camera.formats.types.q4_0 import Q4_0
from camera.registry import BLOCK_FORMATS

LOWEST, HIGHEST = -8, 7
_FP16_MAX = 65504.0


def is_q4(type: str) -> bool:
    """Whether a type is made of such blocks."""
    return isinstance(BLOCK_FORMATS[type], Q4_0)


def to_fp16(scale: torch.Tensor) -> torch.Tensor:
    """The scales that fp16 can hold nearest to these: float32, finite."""
    return scale.clamp(-_FP16_MAX, _FP16_MAX).half().float()


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The code of each weight whose value d·q is nearest, as float32; 0 where the scale is 0.

    Args:
        weight: float32 [..., L].
        scale: float32 [...], one for each block.
    """
    return (weight * inverse(scale)[..., None]).round_().clamp_(LOWEST, HIGHEST)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, finite as fp16 has no number below 6e-8; 0 of 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def pack(codes: torch.Tensor, scales: torch.Tensor, type: str) -> np.ndarray:
    """The bytes of a matrix.

    Args:
        codes: [rows, row_length], whole numbers from −8 to 7, on the device where they are joined.
        scales: float32 [rows, blocks in a row], each a number that fp16 holds.
        type: `q4_0` or `q4_0_64`.

    Returns:
        uint8 [rows, bytes per row].
    """
    form = BLOCK_FORMATS[type]
    assert isinstance(form, Q4_0)
    return form.join((codes - LOWEST).to(torch.uint8), scales.half()).cpu().numpy()
