"""The files of a checkpoint folder, and its tensors, read one by one."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from camera.checkpoints.kinds import what_is_there
from camera.checkpoints.rows import CHUNK_BYTES, StoredRows
from camera.checkpoints.safetensors_file import TensorInfo, map_tensor
from camera.checkpoints.trust import TEMPLATES, is_plain_name
from camera.errors import CameraError
from camera.files import read_json

INDEX_NAME = "model.safetensors.index.json"
IMPORT_NAME = "import.json"
"""What a folder made of a GGUF file says of where it is from; of models made of it that is not true."""
SINGLE_NAME = "model.safetensors"
QUANTIZED_NAME = "quantized.json"
"""What tells a folder of packed tensors."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Weights:
    """What the folder of a checkpoint holds; tensors are read by name."""

    folder: Path
    tensors: dict[str, TensorInfo]

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, in order."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def side_files(self) -> list[str]:
        """Every other file that a copy of the model needs, by its path in the folder: config, tokenizer, generation config,
        remote code, chat templates."""
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in (*self.folder.iterdir(), *(self.folder / TEMPLATES).glob("*.jinja"))
            if path.is_file()
            and not path.name.startswith(".")
            and path.name not in (INDEX_NAME, IMPORT_NAME)
            and not path.name.endswith((*_WEIGHT_SUFFIXES, ".bin.index.json"))
        )

    @property
    def files(self) -> list[str]:
        """Every file that is read of the folder, and copied: config, index, weights, side files."""
        index = [INDEX_NAME] if (self.folder / INDEX_NAME).is_file() else []
        return sorted({"config.json", *index, *self.weight_files, *self.side_files})

    @property
    def tokenizer_files(self) -> list[str]:
        """Those of the side files that decide how text becomes tokens."""
        return [
            name for name in self.side_files if name in _TOKENIZER_FILES or name.startswith(f"{TEMPLATES}/")
        ]

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, backed by a private memory map of its file until it is changed.

        Raises:
            CameraError: if the checkpoint has no such tensor or its file cannot be read.
        """
        if name not in self.tensors:
            raise CameraError(f"{self.folder} has no tensor {name}")
        info = self.tensors[name]
        try:
            return map_tensor(self.folder / info.file, info)
        except (OSError, ValueError) as error:
            raise CameraError(f"{self.folder / info.file} cannot be read ({name}): {error}") from None

    def rows(self, name: str) -> StoredRows:
        """A tensor to be read by ranges of rows; reads nothing itself.

        Raises:
            CameraError: if the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            raise CameraError(f"{self.folder} has no tensor {name}")
        info = self.tensors[name]
        return StoredRows(self.folder / info.file, name, info)

    def start(self, name: str, count: int) -> torch.Tensor:
        """The first numbers of a tensor, at most so many, one after the other.

        Raises:
            CameraError: if the checkpoint has no such tensor, or its file cannot be read.
        """
        rows = self.rows(name)
        flat = replace(rows.info, shape=(prod(rows.info.shape),))
        return replace(rows, info=flat)[:count]

    def read_rows(self, name: str, rows_N: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix [R, C]: [N, C] in its dtype, in memory of their own; see `StoredRows.pick`.

        Args:
            name: of the matrix.
            rows_N: int64, ascending, each in [0, R).
        """
        return self.rows(name).pick(rows_N)

    def read_finite(self, name: str) -> torch.Tensor:
        """`read`, and refuse NaN and infinity.

        Raises:
            CameraError: naming the tensor that holds them.
        """
        tensor = self.read(name)
        if not is_finite(tensor):
            raise self.not_finite(name)
        return tensor

    def check_finite(self, names: Iterable[str]) -> None:
        """Read tensors a few megabytes at a time, and refuse NaN and infinity.

        Raises:
            CameraError: naming the first tensor that holds them.
        """
        for name in names:
            rows = self.rows(name)
            step = max(1, CHUNK_BYTES * rows.shape[0] // max(1, rows.info.size_bytes))
            for start in range(0, rows.shape[0], step):
                if not is_finite(rows[start : start + step]):
                    raise self.not_finite(name)

    def not_finite(self, name: str) -> CameraError:
        """What to raise for a tensor with NaN or infinity."""
        return CameraError(f"{self.folder}: {name} holds NaN or infinity; the checkpoint is damaged")

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to have the bytes of tensors at hand; a hint, and nothing where there is no such call."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            info = self.tensors[name]
            descriptor = os.open(self.folder / info.file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, info.offset, info.size_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether no number is NaN or infinite: bool, one number on the tensor's device."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.device.type != "cpu":
        return tensor.isfinite().all()
    # aminmax passes NaN and infinity on, and unlike isfinite it needs no memory of the tensor's size.
    least, largest = tensor.aminmax()
    return least.isfinite() & largest.isfinite()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds the weights of a checkpoint."""
    return (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file()


def weight_files(folder: Path) -> list[str]:
    """The safetensors files in order, from the index or the single file; paths that leave the folder refused."""
    if (folder / SINGLE_NAME).is_file():  # transformers looks for it first, index or not
        return [SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        index = read_json(folder / INDEX_NAME)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise CameraError(f"{folder / INDEX_NAME} has no weight_map of names: fetch it again")
        if not isinstance(index.get("metadata", {}), dict):
            raise CameraError(f"{folder / INDEX_NAME}: its metadata is no object: fetch it again")
        files = sorted(set(placed.values()))
        outside = [file for file in files if not is_plain_name(file)]
        for file in outside:
            raise CameraError(f"{folder / INDEX_NAME} names {file!r}, which is outside its folder")
        if not files:
            raise CameraError(f"{folder / INDEX_NAME} names no tensor: fetch it again")
        return files
    raise CameraError(
        f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: "
        + (what_is_there(folder) or "fetch its weights, as safetensors")
    )


def placed_by_index(folder: Path) -> dict[str, str]:
    """The file of every tensor by the index; empty where there is one file for all."""
    if (folder / SINGLE_NAME).is_file():
        return {}
    placed: dict[str, str] = read_json(folder / INDEX_NAME)["weight_map"]
    return placed


def check_index(
    folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]], placed: Mapping[str, str]
) -> None:
    """Refuse an index that promises a tensor which its file does not hold.

    Args:
        folder: of the checkpoint.
        headers: what each file holds.
        placed: the index.
    """
    for name, file in placed.items():
        if name not in headers[file]:
            raise CameraError(f"{folder / file} does not hold {name}, which {INDEX_NAME} places there")
