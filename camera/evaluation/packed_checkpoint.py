"""A folder of packed tensors or a GGUF file as the layers of a model read it: dequantised one by one."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import TensorInfo
from camera.formats.gguf_file import numbers
from camera.loading import Source, open_source
from camera.models import named_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class PackedCheckpoint(Checkpoint):
    """What `quantize` or `convert` wrote, in place of the checkpoint that it was made from; all tensors are float32."""

    source: Source

    @classmethod
    def open(cls, place: Path | str) -> "PackedCheckpoint":
        """Read config, summary and headers; no weights.

        Raises:
            CameraError: as `open_source`.
        """
        source = open_source(place)
        config, family = source.config.to_dict(), source.family
        tensors = {
            name: TensorInfo(source.path.name, torch.float32, family.shape(config, placed.weight), 0)
            for name, placed in named_weights(family, config).items()
            if name in source.names
        }
        return cls(source.path, config, family, tensors, source)

    @property
    def hf_config(self) -> "PreTrainedConfig":
        """The config as transformers reads it."""
        return self.source.config

    @property
    def dtype(self) -> torch.dtype:
        """What `dtype: auto` means."""
        return self.source.dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, dequantised.

        Raises:
            CameraError: if there is no such tensor or its file cannot be read.
        """
        return self.source.read(name)

    def rows(self, name: str) -> NoReturn:
        """Not of a packed tensor, whose bytes lie nowhere as numbers: `read_rows` gives some of its rows."""
        raise TypeError(f"{self.folder}: {name} is packed: use read_rows")

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix [R, C], dequantised: float32 [N, C].

        Args:
            name: of the matrix.
            rows: int64 [N], each in [0, R).
        """
        assert self.source.packed is not None
        type, data = self.source.packed(name)
        columns = self.tensors[name].shape[1]
        return torch.from_numpy(numbers(data[rows.numpy()], type, columns, f"{self.folder}: {name}"))

    def read_ahead(self, names: Iterable[str]) -> None:
        """Nothing: what is read is a fraction of what it becomes."""
