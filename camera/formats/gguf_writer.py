"""A GGUF file written as a stream: keys, then the tensor list, then one tensor after the other."""

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from camera.errors import understood
from camera.files import atomic_file, copy_bytes
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS


@dataclass(frozen=True)
class Segment:
    """Rows of a tensor; their bytes are made when their turn comes."""

    read: Callable[[], Iterable[np.ndarray]]
    """Gives uint8 [rows, bytes per row], in pieces or at once."""
    stored: tuple[Path, int] | None = None
    """A file, and the offset in it at which these very bytes lie: they are then copied without being read."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write, in segments of equal size: one, or those of all experts end to end."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    """In torch's order."""
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape[:-1]) * BLOCK_FORMATS[self.type].row_bytes(self.shape[-1])


_NUMBERS = {
    gguf.GGUFValueType.INT32: (int, "<i4"),
    gguf.GGUFValueType.UINT32: (int, "<u4"),
    gguf.GGUFValueType.FLOAT32: (float, "<f4"),
}
"""Python's and numpy's type of the numbers that long arrays are made of."""


class KeyWriter(gguf.GGUFWriter):
    """The library's writer, with arrays packed at once: by the item a vocabulary takes longer than a small model."""

    def check(self, what: str) -> None:
        """Pack every key that was added, as writing does, and drop it.

        Args:
            what: they are of, for the message.

        Raises:
            CameraError: naming the first key whose value a GGUF file cannot hold.
        """
        for values in self.kv_data:
            for key, value in values.items():
                with understood(f"{what}: {key}, which the GGUF file would hold,"):
                    self._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)

    def _pack_val(
        self,
        val: Any,
        vtype: gguf.GGUFValueType,
        add_vtype: bool,
        sub_type: gguf.GGUFValueType | None = None,
    ) -> bytes:
        kinds = set(map(type, val)) if vtype is gguf.GGUFValueType.ARRAY and isinstance(val, list) else set()
        kind = gguf.GGUFValueType.get_type(val[0]) if kinds and sub_type is None else sub_type
        if kind is gguf.GGUFValueType.STRING and kinds == {str}:
            texts = map(str.encode, val)
            items = b"".join(part for text in texts for part in (struct.pack("<Q", len(text)), text))
        elif kind in _NUMBERS and kinds == {_NUMBERS[kind][0]}:
            items = np.array(val, _NUMBERS[kind][1]).tobytes()
        else:  # a single value, or items that the library then packs or refuses
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        head = struct.pack("<I", vtype) if add_vtype else b""
        return head + struct.pack("<IQ", kind, len(val)) + items


@contextmanager
def gguf_file(path: Path, architecture: str) -> Iterator[KeyWriter]:
    """Give the library's writer, to add keys and then call `stream_tensors`; the file appears whole or not at all."""
    with atomic_file(path) as temporary:
        writer = KeyWriter(temporary, architecture)
        try:
            yield writer
        finally:
            writer.close()


def stream_tensors(writer: gguf.GGUFWriter, tensors: list[OutputTensor]) -> Iterable[OutputTensor]:
    """Write everything that was added to `writer`, then the tensors; yields each when it is written."""
    for tensor in tensors:
        # The library would derive the shape from packed bytes, and takes type 40's blocks for NVFP4's. It uses
        # shape and type number as they are for any dtype but uint8, so it gets the shape in weights.
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.size,
            raw_dtype=gguf.GGMLQuantizationType(BLOCK_FORMATS[tensor.type].tensor_number),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        size = tensor.size // len(tensor.segments)
        for segment in tensor.segments:
            if segment.stored is None:
                for piece in segment.read():
                    piece.tofile(file)
            else:
                file.flush()
                copy_bytes(*segment.stored, file.fileno(), file.tell(), size)
                file.seek(size, os.SEEK_CUR)
        writer.write_padding(file, tensor.size)
        yield tensor
