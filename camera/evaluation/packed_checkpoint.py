"""A folder of packed tensors as the layers of a model read it: dequantised one by one."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import TensorInfo
from camera.formats import blocks
from camera.formats.quantized_model import QuantizedModel


@dataclass(frozen=True)
class PackedCheckpoint(Checkpoint):
    """What `quantize` wrote, in place of the checkpoint that it was made from; all tensors are float32."""

    model: QuantizedModel

    @classmethod
    def open(cls, folder: Path | str) -> "PackedCheckpoint":
        """Read config, summary and headers; no weights.

        Raises:
            CameraError: as `QuantizedModel.open`.
        """
        model = QuantizedModel.open(folder)
        tensors = {
            name: TensorInfo(record.file, torch.float32, tuple(record.shape), 0)
            for name, record in model.tensors.items()
        }
        return cls(model.folder, model.config, model.family, tensors, model)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, dequantised.

        Raises:
            CameraError: as `QuantizedModel.dequantize`.
        """
        return self.model.dequantize(name)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix [R, C], dequantised: float32 [N, C].

        Args:
            name: of the matrix.
            rows: int64 [N], each in [0, R).
        """
        record = self.model.tensors[name]
        packed = self.model.packed(name)[rows.numpy()]
        return torch.from_numpy(blocks.dequantize(packed, record.type, record.shape[-1]))

    def read_ahead(self, names: Iterable[str]) -> None:
        """Nothing: what is read is a fraction of what it becomes."""
