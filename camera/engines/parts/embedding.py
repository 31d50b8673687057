"""An embedding in 4-bit blocks: a token reads one row of it, so that a copy in 16 bits would only cost memory."""

import torch
from torch import nn

from camera.engines.parts.blocks import Blocks, scales_of


class BlockEmbedding(nn.Module):
    """Rows of a matrix of 4-bit blocks, dequantised as they are looked up.

    What the two nibbles of a byte stand for is looked up too: shifts of bytes are not what every device has kernels for.
    """

    nibbles_VH: torch.Tensor
    scales_VG: torch.Tensor
    values_B2: torch.Tensor

    def __init__(self, blocks: Blocks, dtype: torch.dtype, device: torch.device) -> None:
        """Copy the blocks to the device. dtype: of the rows that are given."""
        super().__init__()
        self.dtype = dtype
        groups = blocks.columns // blocks.group
        bytes_B = torch.arange(256)
        held = {
            "nibbles_VH": torch.empty((blocks.rows, blocks.columns // 2), dtype=torch.uint8, device=device),
            "scales_VG": torch.empty((blocks.rows, groups), dtype=torch.float16, device=device),
            "values_B2": torch.stack((bytes_B & 15, bytes_B >> 4), dim=1).sub(8).float().to(device),
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)
        for start, stored in blocks.pieces():
            self.nibbles_VH[start : start + len(stored)].copy_(stored[..., 2:].flatten(1))
            self.scales_VG[start : start + len(stored)].copy_(scales_of(stored))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [...] to [..., H]."""
        indices_T = tokens.flatten()
        scales_TG = self.scales_VG.index_select(0, indices_T).float()
        bytes_TH = self.nibbles_VH.index_select(0, indices_T)
        values_N2 = self.values_B2.index_select(0, bytes_TH.flatten().int())
        # A block's low nibbles are its first half, the high ones its second.
        values_TG2L = values_N2.view(*scales_TG.shape, -1, 2).transpose(-1, -2)
        rows_TG2L = (values_TG2L * scales_TG[..., None, None]).to(self.dtype)
        return rows_TG2L.reshape(*tokens.shape, -1)
