"""One safetensors file, read lazily and written as a stream.

Format: 8 bytes little-endian header length, a JSON header (name → dtype, shape, data offsets), then the
tensors' bytes. The safetensors library writes only whole files that are in memory; a 5 GB shard should
need no more memory than its largest tensor, so the writer is ours. Reading is the library's.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from camera.errors import CameraError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 << 20  # the library's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file in the order of its bytes, without reading them.

    Raises:
        CameraError: if the file is missing, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise CameraError(f"{path} is truncated or no safetensors file: fetch it again")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CameraError(f"{path} is missing: fetch the whole checkpoint again") from None
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, numbers or nesting beyond reason
        raise CameraError(f"{path} has no readable safetensors header: fetch it again") from None
    infos: dict[str, TensorInfo] = {}
    end = 0
    try:
        header.pop("__metadata__", None)
        for begin, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
            shape = tuple(header[name]["shape"])
            if not all(type(extent) is int and extent >= 0 for extent in shape):
                raise ValueError(f"{name} has shape {list(shape)}")
            infos[name] = TensorInfo(path.name, DTYPES[header[name]["dtype"]], shape)
            if begin != end or stop - begin != infos[name].size_bytes:
                raise ValueError(f"{name} does not lie where its dtype and shape put it")
            end = stop
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CameraError(f"{path} has a safetensors header that cannot be understood ({error})") from None
    if 8 + length + end != size:
        raise CameraError(
            f"{path} is {size} bytes and its header promises {8 + length + end}: it is truncated, fetch it again"
        )
    return infos


def read_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a file.

    Raises:
        CameraError: if the file is missing, truncated, or not safetensors.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CameraError(f"{path} cannot be read: {error}") from None


class SafetensorsWriter:
    """Writes one file, tensor by tensor, in the order announced.

    Peak memory is one tensor. Use as a context manager; leaving it early is an error, so that a file
    with a complete header and half its data never passes as finished.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Args:
        path: the file to write.
        layout: dtype and shape of every tensor, in the order in which `write` will be given them.
        """
        self.path = path
        self._layout = dict(layout)
        self._waiting: Iterator[str] = iter(self._layout)
        self._file: BinaryIO | None = None

    def __enter__(self) -> "SafetensorsWriter":
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in self._layout.items():
            end = offset + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor.

        Raises:
            ValueError: if it is not the next one announced, or not of the dtype and shape announced.
        """
        expected = next(self._waiting, None)
        if name != expected:
            raise ValueError(f"{self.path}: {name} written where {expected} was announced")
        if (tensor.dtype, tuple(tensor.shape)) != self._layout[name]:
            raise ValueError(
                f"{self.path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {self._layout[name]}"
            )
        assert self._file is not None
        if tensor.numel():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(raw.numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None and (missing := next(self._waiting, None)) is not None:
            raise ValueError(f"{self.path}: {missing} was announced and never written")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors that are in memory, in their order; the same tensors always give the same bytes."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
