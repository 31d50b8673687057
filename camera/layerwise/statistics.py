"""What capture keeps of each layer: two numbers per micro-expert, not the activations."""

from dataclasses import dataclass
from pathlib import Path

import torch

from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError


@dataclass
class LayerStatistics:
    """Statistics of what enters `down_proj`, per FFN channel of one decoder layer, over all tokens seen.

    Sums are float64: each sample is summed in float32 (torch sums pairwise), samples are added in float64, so
    that a quarter of a million tokens do not swamp small channels and the batch size does not matter.
    """

    sum_squares_F: torch.Tensor
    """float64 [F], CPU."""
    max_abs_F: torch.Tensor
    """float32 [F], CPU."""

    @classmethod
    def zeros(cls, width: int) -> "LayerStatistics":
        return cls(torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float32))

    def update(self, act_BTF: torch.Tensor) -> None:
        """Add the activations of a batch of samples [batch, tokens, F], of any floating dtype and device."""
        # In one buffer, in place: fresh memory for every sample costs more in page faults than the arithmetic.
        work_TF = torch.empty(act_BTF.shape[1:], dtype=torch.float32, device=act_BTF.device)
        for act_TF in act_BTF:  # one by one, in order: the same sum whatever the batch size
            work_TF.copy_(act_TF).abs_()
            self.max_abs_F = torch.maximum(self.max_abs_F, work_TF.amax(dim=0).cpu())
            self.sum_squares_F += work_TF.square_().sum(dim=0).cpu().double()

    def merge(self, other: "LayerStatistics") -> None:
        """Add what another rank saw."""
        self.sum_squares_F += other.sum_squares_F
        self.max_abs_F = torch.maximum(self.max_abs_F, other.max_abs_F)

    def check_finite(self, layer: int) -> None:
        """Raise CameraError if any activation was NaN or infinite."""
        if not torch.isfinite(self.max_abs_F).all():
            raise CameraError(
                f"activations of decoder layer {layer} hold NaN or infinity: capture in float32 or bfloat16 "
                "(capture.dtype) if this was float16; otherwise the checkpoint is damaged"
            )
        if not torch.isfinite(self.sum_squares_F).all():
            raise CameraError(
                f"activations of decoder layer {layer} are as large as {float(self.max_abs_F.max()):.1e}, and their "
                "squares exceed float32: the checkpoint is damaged, or its layers are not normalised"
            )


def write_statistics(path: Path, layers: list[LayerStatistics]) -> None:
    """Write all layers to one safetensors file: `layers.N.sum_squares`, `layers.N.max_abs`."""
    write_tensors(path, statistics_tensors(layers))


def statistics_tensors(layers: list[LayerStatistics]) -> dict[str, torch.Tensor]:
    """Layers as named tensors, in order."""
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        tensors[f"layers.{index}.sum_squares"] = layer.sum_squares_F
        tensors[f"layers.{index}.max_abs"] = layer.max_abs_F
    return tensors


def statistics_from(tensors: dict[str, torch.Tensor], count: int, where: Path) -> list[LayerStatistics]:
    """The inverse of `statistics_tensors`.

    Raises:
        CameraError: if a layer is not there.
    """
    try:
        return [
            LayerStatistics(tensors[f"layers.{index}.sum_squares"], tensors[f"layers.{index}.max_abs"])
            for index in range(count)
        ]
    except KeyError as error:
        raise CameraError(
            f"{where} has no {error}: it was captured from another model; capture again"
        ) from None


def read_statistics(path: Path, count: int) -> list[LayerStatistics]:
    """Read what `write_statistics` wrote, for a model of `count` layers."""
    tensors = read_tensors(path)
    if len(tensors) != 2 * count:
        raise CameraError(f"{path} has {len(tensors) // 2} layers, the model {count}: capture this model")
    return statistics_from(tensors, count, path)


def gather_channels(values: torch.Tensor, kept_K: torch.Tensor) -> torch.Tensor:
    """Values [..., F] of the channels int64 [K], contiguous [..., K]; the same bits.

    On the CPU torch gathers integers and float32 three times as fast as it indexes, and half floats as slowly.
    """
    if values.device.type != "cpu":
        return values.index_select(-1, kept_K)
    bits = values.view(torch.int16) if values.itemsize == 2 else values
    return bits.gather(-1, kept_K.expand(*values.shape[:-1], -1)).view(values.dtype)
