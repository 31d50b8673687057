"""The importance matrix in the file that llama-imatrix wrote before 2025, usually `imatrix.dat`.

Format, little-endian: the number of entries (int32); for each the length of its name (int32) and the name, how often it was
summed (int32), how many numbers follow (int32), and they: float32, all matrices of a tensor one after the other. Then,
where they are written, the number of chunks and the name of the text.
"""

import struct
from pathlib import Path

import numpy as np
import torch

from camera.errors import CameraError

_MOST_NAME = 1024
"""Bytes in a tensor's name; ggml's own limit is 64."""


def read_dat(path: Path) -> tuple[dict[str, tuple[torch.Tensor, int]], str | None]:
    """Sums and how often they were summed by llama.cpp's name of the tensor, and the name of the text.

    What is divided by that number is the mean of x², or in files of before 2024 its sum over a chunk: the same up to one
    factor, which no use of it minds.

    Raises:
        CameraError: if it is no such file, or is damaged.
    """
    data, at = path.read_bytes(), 0

    def number() -> int:
        nonlocal at
        (found,) = struct.unpack_from("<i", data, at)
        at += 4
        return int(found)

    def text(most: int) -> str:
        nonlocal at
        length = number()
        if not 0 <= length <= most or at + length > len(data):
            raise ValueError(f"a name of {length} bytes")
        at += length
        return data[at - length : at].decode()

    found: dict[str, tuple[torch.Tensor, int]] = {}
    try:
        for _ in range(number()):
            name, summed, count = text(_MOST_NAME), number(), number()
            if summed < 1 or not 0 < count <= (len(data) - at) // 4:
                raise ValueError(f"{name} has {count} numbers, summed {summed} times")
            found[name] = torch.from_numpy(np.frombuffer(data, "<f4", count, at).copy()), summed
            at += 4 * count
        if not found:
            raise ValueError("no entry")
        if at == len(data):
            return found, None
        number()  # of chunks
        return found, text(len(data)) or None
    except (struct.error, ValueError) as error:
        raise CameraError(
            f"{path} is no importance matrix: neither a GGUF file, nor whole in the older format of llama-imatrix ({error})"
        ) from None
