"""One safetensors file, read lazily and written as a stream.

Format: 8 bytes little-endian header length, a JSON header (name → dtype, shape, data offsets), then the
tensors' bytes. The safetensors library writes only whole files that are in memory; a 5 GB shard should
need no more memory than its largest tensor, so the writer is ours. Reading is the library's.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch

from camera.checkpoints.kinds import LFS_POINTER
from camera.errors import CameraError
from camera.files import copy_bytes, reserve, write_at
from camera.held import opened

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
_QUANTISED = ("F8_", "F6_", "F4")
"""How the names of dtypes begin that hold numbers without their scales."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = (
    16 << 20
)  # some 100,000 tensors; as objects it is many times that. The library's limit is 100 MB


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file in the order of its bytes, without reading them.

    Raises:
        CameraError: if the file is missing, truncated, or not safetensors.
    """
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if LFS_POINTER.startswith(start) and len(start) == 8:
                raise CameraError(
                    f"{path} is a pointer of Git LFS and no weights: `git lfs pull` fetches them"
                )
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
            if header[name]["dtype"].startswith(_QUANTISED):
                raise CameraError(
                    f"{path}: {name} is {header[name]['dtype']}: the weights are quantised already; dequantise the "
                    "checkpoint to bfloat16 first, or take the original"
                )
            if not all(type(extent) is int and extent >= 0 for extent in shape):
                raise ValueError(f"{name} has shape {list(shape)}")
            name.encode()  # refuses halves of characters, which no other file can hold
            infos[name] = TensorInfo(path.name, DTYPES[header[name]["dtype"]], shape, 8 + length + begin)
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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file on the CPU, backed by one private map of it until they are changed.

    Raises:
        CameraError: if the file is missing, truncated, or not safetensors.
    """
    infos = read_header(path)
    try:
        with opened(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {name: _tensor(mapped, info, info.offset) for name, info in infos.items()}
    except (ValueError, OSError) as error:
        raise CameraError(f"{path} cannot be read: {error}") from None


def map_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor on the CPU, backed by a private map of its bytes alone until it is changed.

    The library opens and parses the whole file for every tensor, which counts where there are thousands.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it ends before the tensor does.
    """
    start = info.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    inside = info.offset - start
    if not info.size_bytes:
        return _tensor(b"", info, 0)
    with opened(path) as file:
        mapped = mmap.mmap(file.fileno(), inside + info.size_bytes, access=mmap.ACCESS_COPY, offset=start)
    return _tensor(mapped, info, inside)


def _tensor(data: mmap.mmap | bytes, info: TensorInfo, offset: int) -> torch.Tensor:
    if not info.size_bytes:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(data, dtype=info.dtype, count=prod(info.shape), offset=offset).view(info.shape)


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor of a file, in the order of their bytes."""


class SafetensorsWriter:
    """Writes one file whose layout is known, tensor by tensor, in any order.

    The header is written and the room reserved at once, so memory is never more than the tensor at hand and a
    full disk is noticed at the start. Use as a context manager; leaving it early is an error, so that a file with
    a complete header and half its data never passes as finished.
    """

    def __init__(self, path: Path, layout: Layout, *, resume: bool = False) -> None:
        """Args:
        path: the file to write.
        layout: what it will hold.
        resume: go on with a file that an earlier writer of the same layout left; see `already_written`.

        Raises:
            CameraError: if `resume` is asked for and the file is not of this layout.
        """
        self.path = path
        self._layout = dict(layout)
        self._missing = set(self._layout)
        self._rows_left: dict[str, int] = {}
        self._lock = Lock()
        header = _header(self._layout)
        self._offsets: dict[str, int] = {}
        end = len(header)
        for name, (dtype, shape) in self._layout.items():
            self._offsets[name] = end
            end += prod(shape) * dtype.itemsize
        if resume:
            if not path.is_file():
                raise CameraError(f"{path} is missing: remove its folder and start again")
            self._file = path.open("r+b")
            if self._file.read(len(header)) != header or os.fstat(self._file.fileno()).st_size != end:
                self._file.close()
                raise CameraError(
                    f"{path} is not the unfinished file it should be: remove it and start again"
                )
        else:
            self._file = path.open("w+b")
            self._file.write(header)
            self._file.flush()
            reserve(self._file.fileno(), end)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def already_written(self, names: Iterable[str]) -> None:
        """Count tensors as written that the earlier writer is known to have finished."""
        self._missing.difference_update(names)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place.

        Raises:
            ValueError: if it was not announced, or not with this dtype and shape.
        """
        if name not in self._layout:
            raise ValueError(f"{self.path}: {name} was not announced")
        if (tensor.dtype, tuple(tensor.shape)) != self._layout[name]:
            raise ValueError(
                f"{self.path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {self._layout[name]}"
            )
        if tensor.numel():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.seek(self._offsets[name])
            self._file.write(raw.numpy().data)
        self._missing.discard(name)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Put some rows of a tensor in their place. Threads may write side by side; each row is to be written once.

        Args:
            name: of the tensor.
            start: the first row.
            rows: on the CPU.

        Raises:
            ValueError: if the tensor was not announced, or has other rows.
        """
        dtype, shape = self._layout.get(name, (None, ()))
        if not shape or (rows.dtype, *rows.shape[1:]) != (dtype, *shape[1:]) or start + len(rows) > shape[0]:
            raise ValueError(
                f"{self.path}: {name} was not announced with {rows.dtype} rows {start} to {start + len(rows)} of "
                f"{list(rows.shape[1:])}"
            )
        row_bytes = prod(shape[1:]) * rows.dtype.itemsize
        raw = rows.detach().contiguous().reshape(-1).view(torch.uint8)
        write_at(self._file.fileno(), raw.numpy().data, self._offsets[name] + start * row_bytes)
        with self._lock:
            self._rows_left[name] = self._rows_left.get(name, shape[0]) - len(rows)
            if not self._rows_left[name]:
                self._missing.discard(name)

    def copy(self, name: str, source: Path, info: TensorInfo) -> None:
        """Put the bytes of another file's tensor in place, without taking them into memory.

        Raises:
            ValueError: if it was not announced, or not with this dtype and shape.
        """
        if self._layout.get(name) != (info.dtype, info.shape):
            raise ValueError(f"{self.path}: {name} was not announced as {info.dtype} {info.shape}")
        self._file.flush()
        copy_bytes(source, info.offset, self._file.fileno(), self._offsets[name], info.size_bytes)
        self._missing.discard(name)

    def place(self, name: str) -> TensorInfo:
        """Where a tensor lies in the file, once it was written."""
        self._file.flush()
        dtype, shape = self._layout[name]
        return TensorInfo(self.path.name, dtype, shape, self._offsets[name])

    def sync(self) -> None:
        """Make durable what was written so far."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file.

        Raises:
            ValueError: if a tensor that was announced was not written.
        """
        self._file.close()
        for name in self._layout:
            if name in self._missing:
                raise ValueError(f"{self.path}: {name} was announced and never written")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _header(layout: Layout) -> bytes:
    """Length and JSON text, padded so that the data is aligned to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors that are in memory, in their order; the same tensors always give the same bytes."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
