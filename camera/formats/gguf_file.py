"""An open GGUF file: its keys and tensors, as the reader found them."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import torch

from camera.errors import CameraError
from camera.formats import blocks
from camera.formats.gguf_parser import map_file
from camera.models import Family, family_of_architecture
from camera.registry import BLOCK_FORMATS

V = TypeVar("V", int, float, str, bool)
_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file; its bytes are read when they are touched."""

    name: str
    type: str
    """A BlockType, or the lower-case name of another ggml type (`q6_k`) in files of other makers."""
    shape: tuple[int, ...]
    """In torch's order: rows first, the length of a row last."""
    path: Path = field(repr=False, compare=False)
    offset: int = field(repr=False, compare=False)
    """Of its first byte in the file."""
    packed_shape: tuple[int, int] = field(repr=False, compare=False)
    """Rows and bytes per row; a vector is one row."""

    @property
    def size_bytes(self) -> int:
        """How many it takes in the file."""
        return prod(self.packed_shape)

    @property
    def data(self) -> np.ndarray:
        """uint8 [rows, bytes per row], a read-only map of the file.

        Each is a map of its own, so that what was read of it is this process's memory only as long as the array is.
        """
        content = np.frombuffer(map_file(self.path), np.uint8, self.size_bytes, self.offset)
        return content.reshape(self.packed_shape)

    def numbers(self, data: np.ndarray) -> np.ndarray:
        """float32 rows from its bytes, or from such bytes in another order of rows.

        Raises:
            CameraError: if the type cannot be read here.
        """
        return numbers(data, self.type, self.shape[-1] if self.shape else 1, f"{self.path}: {self.name}")

    def item(self, index: int) -> "GgufTensor":
        """Of a tensor of three dimensions, one matrix."""
        rows, row_bytes = self.shape[1], self.packed_shape[1]
        start = self.offset + index * rows * row_bytes
        return replace(self, shape=self.shape[1:], offset=start, packed_shape=(rows, row_bytes))


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file."""

    path: Path
    metadata: dict[str, Any]
    """Every key, in file order: int, float, bool, str, or a list of them."""
    value_types: dict[str, tuple[int, int | None]]
    """The GGUF type number of each key's value, and of its items where it is an array."""
    tensors: dict[str, GgufTensor]
    """Every tensor by its GGUF name, in file order."""
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was worked out once from the rest: a file may hold thousands of experts."""

    @cached_property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.value("general.architecture", str)

    @cached_property
    def family(self) -> Family:
        """The family of its architecture and tensors.

        Raises:
            CameraError: if it is not supported.
        """
        return family_of_architecture(self.architecture, str(self.path), self.tensors)

    def value(self, key: str, kind: type[V], default: V | None = None) -> V:
        """A key of one of four kinds: `int`, a whole number not below zero; `float`, a finite number, the shortest
        decimal (1e-05) that its float32 stands for; `bool`; or `str`.

        Raises:
            CameraError: if it is something else, or is missing and there is no default.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise CameraError(f"{self.path} has no key {key}: it is no language model, or a damaged one")
        if kind is float and type(value) in (int, float) and isfinite(value):
            return kind(str(np.float32(value)))
        if type(value) is not kind or isinstance(value, float) or (isinstance(value, int) and value < 0):
            raise CameraError(
                f"{self.path}: {key} is {str(value)[:40]!r}, not {_KINDS[kind]}: the file is damaged, fetch or write "
                "it again"
            )
        return value

    def tensor(self, name: str) -> GgufTensor:
        """A tensor by its GGUF name.

        Raises:
            CameraError: if there is none.
        """
        if name not in self.tensors:
            raise CameraError(f"{self.path} has no tensor {name}")
        return self.tensors[name]

    def dequantize(self, name: str) -> torch.Tensor:
        """The numbers of a tensor: float32, of its shape.

        Raises:
            CameraError: if there is no such tensor, or its type cannot be read here.
        """
        tensor = self.tensor(name)
        return torch.from_numpy(tensor.numbers(tensor.data)).reshape(tensor.shape)


def numbers(data: np.ndarray, type: str, row_length: int, what: str) -> np.ndarray:
    """float32 rows from the bytes of rows: uint8 [rows, bytes per row].

    Raises:
        CameraError: if the type cannot be read here; names what it is.
    """
    if type in BLOCK_FORMATS:
        return blocks.dequantize(data, type, row_length)
    try:
        return gguf.dequantize(data, gguf.GGMLQuantizationType[type.upper()])
    except (NotImplementedError, KeyError):
        raise CameraError(
            f"{what} is {type}, which cannot be turned into numbers here: requantise the file as q4_0, q8_0 or f16"
        ) from None
