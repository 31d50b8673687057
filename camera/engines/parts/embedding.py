"""An embedding in 4-bit blocks: a token reads one row of it, so that a copy in 16 bits would only cost memory."""

import torch
from torch import nn

from camera.engines.parts.blocks import Blocks, codes_of, scales_of

BLOCK_DEVICES = ("cpu", "cuda")
"""Where rows are dequantised as they are looked up; elsewhere an embedding is held in 16 bits."""


class BlockEmbedding(nn.Module):
    """Rows of a matrix of 4-bit blocks, dequantised as they are looked up."""

    blocks_VGB: torch.Tensor

    def __init__(self, blocks: Blocks, dtype: torch.dtype, device: torch.device) -> None:
        """Copy the blocks to the device. dtype: of the rows that are given."""
        super().__init__()
        self.dtype = dtype
        shape = (blocks.rows, *blocks.read(0, 1).shape[1:])
        self.register_buffer(
            "blocks_VGB", torch.empty(shape, dtype=torch.uint8, device=device), persistent=False
        )
        for start, stored in blocks.pieces():
            self.blocks_VGB[start : start + len(stored)].copy_(stored)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [...] to [..., H]."""
        stored = self.blocks_VGB.index_select(0, tokens.flatten())
        codes_TGL = codes_of(stored).float().unflatten(1, (stored.shape[1], -1))
        rows_TGL = (codes_TGL - 8) * scales_of(stored).float()[..., None]
        rows: torch.Tensor = rows_TGL.to(self.dtype).view(*tokens.shape, -1)
        return rows
