"""Q4_0_64: a Q4_0 whose block is 64 weights long, for the Ascend 910B. Described in docs/formats.md."""

import numpy as np

from camera.formats.format import Marker
from camera.formats.types.q4_0 import Q4_0
from camera.registry import BLOCK_FORMATS


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
        nibbles, scales = self.split(data)
        return Q4_0().join(nibbles, scales.repeat(2, axis=1))


BLOCK_FORMATS.register(Q4_0_64.name, Q4_0_64())
