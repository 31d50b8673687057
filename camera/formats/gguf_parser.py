"""The head of a GGUF file: keys and tensor list, every length validated; and the keys that are ours."""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from camera.errors import CameraError

BLOCK_TYPE_KEY = "camera.block_type"
"""The type that the matrices were asked to be of."""
TWIN_KEY = "camera.twin_of"
"""In a Q4_0 file that holds exactly the numbers of another type: that type."""
LINEAGE_KEY = "camera.lineage"
"""JSON text: what made the model."""
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_COUNT = 1 << 24  # vocabularies have a fiftieth of it; a list costs many times its bytes in the file
_MAX_DEPTH = 4  # of arrays in arrays; the format sets no limit, files have none
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MIN_BYTES = {_STRING: 8, _ARRAY: 12, **{kind: np.dtype(code).itemsize for kind, code in _SCALARS.items()}}


@dataclass(frozen=True)
class TensorEntry:
    """One line of a file's tensor list."""

    name: str
    shape: tuple[int, ...]
    """In torch's order."""
    type_number: int
    offset: int
    """From the start of the tensors' bytes."""


def map_file(path: Path) -> mmap.mmap:
    """A GGUF file's bytes, to be read where they are asked for.

    Raises:
        CameraError: if the file is missing, empty or cannot be read.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CameraError(f"{path} is empty: fetch or write it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CameraError(f"{path} is missing: give the path of a .gguf file") from None
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys of a GGUF file alone; unlike `gguf_reader.open_gguf` it brings no torch.

    Raises:
        CameraError: if the file is missing, or its head is damaged or of another version or byte order.
    """
    metadata, _, _ = Parser(path, map_file(path)).parse()
    return metadata


class Parser:
    """Reads the head of a file once, from start to end."""

    def __init__(self, path: Path, raw: mmap.mmap | bytes) -> None:
        self.path = path
        self._raw = raw
        self._size = len(raw)
        self._at = 0
        self._items = 0
        """Of all arrays so far."""
        self.value_types: dict[str, tuple[int, int | None]] = {}
        """Of each key the number of its type, and of its items where it is an array."""

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorEntry], int]:
        """The keys, the tensor list, and where the tensors' bytes start.

        Raises:
            CameraError: at the first thing that cannot be so.
        """
        if self._take(4) != MAGIC:
            raise CameraError(f"{self.path} is no GGUF file: it does not start with {MAGIC.decode()}")
        version = self._integer("<I")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise CameraError(f"{self.path} is a big-endian GGUF file, which is not read here")
            raise CameraError(f"{self.path} is GGUF version {version}; read are versions 2 and 3")
        tensor_count = self._count("tensors", least_bytes=8 + 4 + 4 + 8)
        key_count = self._count("keys", least_bytes=8 + 4 + 1)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                self._damaged(f"key {key} is there twice")
            kind = self._integer("<I")
            item_kind = (
                int.from_bytes(self._raw[self._at : self._at + 4], "little") if kind == _ARRAY else None
            )
            self.value_types[key] = kind, item_kind
            metadata[key] = self._value(kind, depth=0)
        entries: dict[str, TensorEntry] = {}
        for _ in range(tensor_count):
            entry = self._entry()
            if entry.name in entries:
                self._damaged(f"tensor {entry.name} is there twice")
            entries[entry.name] = entry
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self._damaged(f"general.alignment is {alignment!r}, not a power of two")
        for entry in entries.values():
            if entry.offset % alignment:
                self._damaged(f"tensor {entry.name} is not aligned to {alignment} bytes")
        data_start = -(-self._at // alignment) * alignment
        return metadata, entries, min(data_start, self._size)

    def _entry(self) -> TensorEntry:
        name = self._string()
        dimensions = self._integer("<I")
        if dimensions > _MAX_DIMENSIONS:
            self._damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._integer("<Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            self._damaged(f"tensor {name} has shape {list(shape)}")
        return TensorEntry(name, shape, self._integer("<I"), self._integer("<Q"))

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth)
        if kind not in _SCALARS:
            self._damaged(f"a key has the unknown type {kind}")
        return self._numbers(kind, 1)[0]

    def _array(self, depth: int) -> list[Any]:
        kind = self._integer("<I")
        if kind not in _MIN_BYTES or depth >= _MAX_DEPTH:
            self._damaged(f"an array of type {kind} at depth {depth}")
        count = self._count("array items", least_bytes=_MIN_BYTES[kind])
        self._items += count
        if self._items > _MAX_COUNT:
            self._damaged(f"{self._items} items of arrays, and no file has more than {_MAX_COUNT}")
        if kind in _SCALARS:
            return self._numbers(kind, count)
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        found: list[Any] = values.astype(bool).tolist() if kind == _BOOL else values.tolist()
        return found

    def _string(self) -> str:
        length = self._count("bytes of a string", least_bytes=1)
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            self._damaged("a string is not UTF-8")

    def _count(self, what: str, least_bytes: int) -> int:
        """A 64-bit count of things that follow; refused if the rest of the file could not hold them."""
        count = self._integer("<Q")
        if count > _MAX_COUNT or count * least_bytes > self._size - self._at:
            self._damaged(f"{count} {what} are promised and {self._size - self._at} bytes are left")
        return count

    def _integer(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, length: int) -> bytes:
        if length > self._size - self._at:
            self._damaged("it ends inside its head")
        start, self._at = self._at, self._at + length
        return self._raw[start : self._at]

    def _damaged(self, what: str) -> NoReturn:
        raise CameraError(
            f"{self.path} is truncated or damaged at byte {self._at} ({what}): fetch or write it again"
        )
