"""Q4_0_64: a Q4_0 whose block is 64 weights long, for the Ascend 910B. Described in docs/formats.md."""

import numpy as np
import torch

from camera.formats.format import Marker
from camera.formats.types.q4_0 import Q4_0
from camera.registry import BLOCK_FORMATS

_LOW = 0x0F0F
"""The low nibble of each of two bytes."""


class Q4_0_64(Q4_0):
    """As Q4_0; the NPU's tiled kernel takes groups of 64 weights and not of 32."""

    name = "q4_0_64"
    block_length, block_bytes = 64, 34
    tensor_number, file_number = 40, 39  # upstream has since given both to NVFP4: see docs/formats.md
    fallback = "q8_0"
    marker = Marker(
        "camera.q4_0_64.layout",
        "block=64;bytes=34;scale=fp16;nibbles=offset8;low=0..31;high=32..63",
        "NVFP4",
    )

    def twin(self, data: np.ndarray) -> np.ndarray:
        """The Q4_0 bytes that hold exactly the same numbers: each block becomes two with its scale.

        Args:
            data: uint8 [rows, 34 · blocks].

        Returns:
            uint8 [rows, 36 · blocks].
        """
        # Two bytes at a time. The nibbles of a byte are 32 weights apart here, and 16 there.
        words = torch.from_numpy(np.array(data).reshape(-1, self.block_bytes)).view(torch.int16)
        twins = torch.empty(len(words), 2 * Q4_0.block_bytes, dtype=torch.uint8)
        first, second = twins.view(torch.int16).chunk(2, dim=1)
        start, end = words[:, 1:9].contiguous(), words[:, 9:].contiguous()
        first[:, 0] = second[:, 0] = words[:, 0]
        torch.bitwise_or(start & _LOW, (end & _LOW) << 4, out=first[:, 1:])
        torch.bitwise_or((start >> 4) & _LOW, end & ~_LOW, out=second[:, 1:])
        return twins.view(len(data), -1).numpy()


BLOCK_FORMATS.register(Q4_0_64.name, Q4_0_64())
