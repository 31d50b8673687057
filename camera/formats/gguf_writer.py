"""A GGUF file written as a stream: keys, then the tensor list, then one tensor after the other."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from camera.files import whole_file
from camera.formats import blocks
from camera.options import BlockType


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write; its bytes are made when its turn comes."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    """In torch's order."""
    read: Callable[[], np.ndarray]
    """Gives uint8 [rows, bytes per row]."""

    @property
    def size(self) -> int:
        """Bytes."""
        rows = self.shape[0] if len(self.shape) == 2 else 1
        return rows * blocks.FORMATS[self.type].row_bytes(self.shape[-1])


@contextmanager
def gguf_file(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """Give the library's writer, to add keys and then call `write_tensors`; the file appears whole or not at all."""
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            yield writer
        finally:
            writer.close()


def write_tensors(writer: gguf.GGUFWriter, tensors: list[OutputTensor]) -> Iterable[OutputTensor]:
    """Write everything that was added to `writer`, then the tensors; yields each when it is written."""
    for tensor in tensors:
        # The library would derive the shape from packed bytes, and takes type 40's blocks for NVFP4's. It uses
        # shape and type number as they are for any dtype but uint8, so it is told the shape in weights.
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.size,
            raw_dtype=gguf.GGMLQuantizationType(blocks.FORMATS[tensor.type].tensor_number),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.read())
        yield tensor
