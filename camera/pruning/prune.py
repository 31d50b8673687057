"""Physical prune: choose the channels that stay, and write the narrower feed-forward matrices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError
from camera.files import read_json, whole_file, write_json
from camera.options import PruneOptions
from camera.progress import Progress, silent
from camera.pruning.importance import kept_channels, kept_width
from camera.pruning.score import read_scores

KEPT = "kept.safetensors"
SUMMARY = "prune.json"


@dataclass(frozen=True)
class Pruned:
    """A folder that `prune` wrote: which channels stay, and the matrices that changed."""

    folder: Path
    mode: str
    width: int
    """The kept FFN width (that of the matrices in physical mode)."""
    layers: int

    @classmethod
    def open(cls, folder: Path) -> "Pruned":
        """Raises CameraError if the folder is not one of `prune`."""
        summary: dict[str, Any] = read_json(folder / SUMMARY)
        try:
            return cls(folder, summary["mode"], summary["kept_width"], summary["layers"])
        except (KeyError, TypeError) as error:
            raise CameraError(f"{folder / SUMMARY} is not what prune writes ({error}): prune again") from None

    def kept(self) -> list[torch.Tensor]:
        """int64 [kept] of every layer, ascending."""
        tensors = read_tensors(self.folder / KEPT)
        return [tensors[f"layers.{index}.kept"] for index in range(self.layers)]

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The changed matrices of one layer by Hugging Face name; empty where nothing was removed."""
        path = self.folder / _layer_file(index)
        return read_tensors(path) if path.is_file() else {}


def prune(
    checkpoint: Checkpoint, scored: Path, out: Path, options: PruneOptions, progress: Progress = silent
) -> None:
    """Write `kept.safetensors`, one file of changed matrices per layer, and `prune.json` into the folder `out`.

    Ratio 0 changes no matrix. A killed prune goes on at the first layer whose file is not there.

    Args:
        checkpoint: the model.
        scored: the folder that scoring wrote.
        out: an existing folder.
        options: ratio, mode and rounding; the scores already hold the reduce-ratio.
        progress: told (layers done, all).

    Raises:
        CameraError: if nothing would be pruned, or the scores are those of another model.
    """
    count, width = checkpoint.layer_count, checkpoint.ffn_width
    keep = kept_width(width, options.ratio, options.multiple_of)
    kept: dict[str, torch.Tensor] = {}
    shares = []
    for index, scores_F in enumerate(read_scores(scored, count)):
        if len(scores_F) != width:
            raise CameraError(
                f"{scored}: layer {index} has {len(scores_F)} scores, the model {width} channels"
            )
        kept_K = kept_channels(scores_F, keep)
        kept[f"layers.{index}.kept"] = kept_K
        shares.append(
            float(scores_F[kept_K].sum() / scores_F.sum().clamp_min(torch.finfo(scores_F.dtype).tiny))
        )
        path = out / _layer_file(index)
        if keep < width and not path.is_file():
            with whole_file(path) as temporary:
                write_tensors(temporary, pruned_matrices(checkpoint, index, kept_K, options.mode))
        progress(index + 1, count)
    write_tensors(out / KEPT, kept)
    write_json(
        out / SUMMARY,
        {
            "mode": options.mode,
            "ratio": options.ratio,
            "multiple_of": options.multiple_of,
            "layers": count,
            "width": width,
            "kept_width": keep,
            "removed_share": 1 - keep / width,
            "importance_kept_share": shares,
        },
    )


def pruned_matrices(
    checkpoint: Checkpoint, layer: int, kept_K: torch.Tensor, mode: str
) -> dict[str, torch.Tensor]:
    """Gate, up and down of one layer without the other channels: sliced (`physical`) or zeroed (`mask`).

    Returns:
        by Hugging Face name: gate and up [K, H], down [H, K] (or with F in place of K), dtype unchanged.
    """
    gate_name, up_name, down_name = checkpoint.family.ffn_names(layer)
    gate_FH, up_FH = checkpoint.read_finite(gate_name), checkpoint.read_finite(up_name)
    down_HF = checkpoint.read_finite(down_name)
    if mode == "physical":
        return {
            gate_name: gate_FH[kept_K],
            up_name: up_FH[kept_K],
            down_name: down_HF[:, kept_K].contiguous(),
        }
    stays_F = torch.zeros(len(gate_FH), dtype=torch.bool)
    stays_F[kept_K] = True
    return {
        gate_name: torch.where(stays_F[:, None], gate_FH, torch.zeros((), dtype=gate_FH.dtype)),
        up_name: torch.where(stays_F[:, None], up_FH, torch.zeros((), dtype=up_FH.dtype)),
        down_name: torch.where(stays_F, down_HF, torch.zeros((), dtype=down_HF.dtype)),
    }


def _layer_file(index: int) -> str:
    return f"layer-{index:04d}.safetensors"
