"""GGUF files, stock ones and ours, read lazily and without trust in what they claim.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf library's reader is not used: it
refuses a type number that it does not know, reads Q4_0_64 as the NVFP4 that shares its number, and takes every
count in the file at its word.
"""

from math import prod
from pathlib import Path
from typing import Any

import gguf

from camera.errors import CameraError
from camera.formats.gguf_file import GgufFile, GgufTensor
from camera.formats.gguf_model import cached_numbers, hf_config, hf_names, packed_hf_tensor, read_hf_tensor
from camera.formats.gguf_parser import Parser, TensorEntry, map_file
from camera.registry import BLOCK_FORMATS

__all__ = [
    "GgufFile",
    "GgufTensor",
    "cached_numbers",
    "hf_config",
    "hf_names",
    "is_q4_0_64",
    "open_gguf",
    "packed_hf_tensor",
    "read_hf_tensor",
]


def open_gguf(path: Path | str) -> GgufFile:
    """Read a file's metadata and tensor list; no weights.

    Raises:
        CameraError: if the file is missing, damaged, truncated, of another version or byte order, or holds
            type 40 without saying that this is Q4_0_64.
    """
    path = Path(path)
    raw = map_file(path)
    parser = Parser(path, raw)
    metadata, entries, data_start = parser.parse()
    tensors = {entry.name: _tensor(path, entry, data_start, len(raw), metadata) for entry in entries.values()}
    return GgufFile(path, metadata, parser.value_types, tensors)


def is_q4_0_64(file: GgufFile) -> bool:
    """Whether a file holds Q4_0_64, which a stock llama.cpp would read as NVFP4 and print garbage from."""
    return any(tensor.type == "q4_0_64" for tensor in file.tensors.values())


def _tensor(
    path: Path, entry: TensorEntry, data_start: int, size: int, metadata: dict[str, Any]
) -> GgufTensor:
    type_name, block_length, block_bytes = _type(path, entry, metadata)
    row_length = entry.shape[-1] if entry.shape else 1
    if row_length % block_length:
        raise CameraError(
            f"{path}: {entry.name} has rows of {row_length} and {type_name} has blocks of {block_length}: "
            "the file is damaged, fetch or write it again"
        )
    row_bytes = row_length // block_length * block_bytes
    rows = prod(entry.shape[:-1])
    end = entry.offset + rows * row_bytes
    if end > size - data_start:
        raise CameraError(
            f"{path} ends before {entry.name} does ({size - data_start} of {end} bytes of tensors): it is "
            "truncated, fetch or write it again"
        )
    return GgufTensor(entry.name, type_name, entry.shape, path, data_start + entry.offset, (rows, row_bytes))


def _type(path: Path, entry: TensorEntry, metadata: dict[str, Any]) -> tuple[str, int, int]:
    """Name, block length and block bytes of a tensor's type."""
    number = entry.type_number
    form = next((form for form in BLOCK_FORMATS.values() if form.tensor_number == number), None)
    if form is not None:
        if (marker := form.marker) is not None and metadata.get(marker.key) != marker.value:
            name = form.name.upper()
            raise CameraError(
                f"{path}: {entry.name} is of type {number}. In stock files that is {marker.stock}, which is not read "
                f"here; a {name} file says so in the key {marker.key}, and this one does not. If it came from another "
                f"tool's {name}, convert the checkpoint again with this one"
            )
        return form.name, form.block_length, form.block_bytes
    try:
        stock = gguf.GGMLQuantizationType(number)
        block_length, block_bytes = gguf.GGML_QUANT_SIZES[stock]
    except (ValueError, KeyError):
        raise CameraError(
            f"{path}: {entry.name} is of type {number}, which is not known here: the file is damaged, or "
            "of a newer llama.cpp"
        ) from None
    return stock.name.lower(), block_length, block_bytes
