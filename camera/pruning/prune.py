"""Physical prune: choose the channels that stay, and write the narrower feed-forward matrices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError
from camera.files import read_json, whole_file, write_json
from camera.layerwise.statistics import gather_channels
from camera.options import PruneOptions
from camera.progress import Progress, silent
from camera.pruning.importance import kept_channels, kept_width
from camera.pruning.score import read_scores

_BEYOND = {"score", "refit", "damping", "round", "steps", "sparsity", "sparsity_pattern"} | {
    "allocation",
    "allocation_bound",
    "allocation_windows",
}
"""Options beyond CAMERA's method that the summary names where they are in use."""
KEPT = "kept.safetensors"
SUMMARY = "prune.json"


@dataclass(frozen=True)
class Pruned:
    """A folder that `prune` wrote: which channels stay, and the matrices that changed."""

    folder: Path
    mode: str
    layers: int
    hidden_size: int
    source_width: int
    width: int
    """The kept FFN width (that of the matrices in physical mode); of layers that differ the largest."""
    removed_share: float
    """Of all FFN channels."""
    sparsity: float = 0.0
    """Share of the weights that stay that were asked to be zero."""

    @classmethod
    def open(cls, folder: Path) -> "Pruned":
        """Raises CameraError if the folder is not one of `prune`."""
        summary: dict[str, Any] = read_json(folder / SUMMARY)
        try:
            return cls(
                folder,
                summary["mode"],
                summary["layers"],
                summary["hidden_size"],
                summary["width"],
                summary["kept_width"],
                summary["removed_share"],
                summary.get("sparsity", 0.0),
            )
        except (KeyError, TypeError) as error:
            raise CameraError(f"{folder / SUMMARY} is not what prune writes ({error}): prune again") from None

    def check_belongs_to(self, checkpoint: Checkpoint) -> None:
        """Raise CameraError if this was not pruned from a model of the checkpoint's shape."""
        ours = (self.layers, self.hidden_size, self.source_width)
        theirs = (checkpoint.layer_count, checkpoint.hidden_size, checkpoint.ffn_width)
        if ours != theirs:
            raise CameraError(
                f"{self.folder} was pruned from a model of (layers, hidden, FFN) {ours} and {checkpoint.folder} "
                f"has {theirs}: prune this model"
            )

    def kept(self) -> list[torch.Tensor]:
        """int64 [kept] of every layer, ascending."""
        tensors = read_tensors(self.folder / KEPT)
        return [tensors[f"layers.{index}.kept"] for index in range(self.layers)]

    @property
    def changed(self) -> bool:
        """Whether any matrix is another than the source's."""
        return self.removed_share > 0 or self.sparsity > 0

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The changed matrices of one layer by Hugging Face name; empty where nothing changed.

        Raises:
            CameraError: if the layer's file is missing or damaged.
        """
        return read_tensors(self.folder / layer_file(index)) if self.changed else {}


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
    scores = read_scores(scored, count)
    for index, scores_F in enumerate(scores):
        if len(scores_F) != width:
            raise CameraError(
                f"{scored}: layer {index} has {len(scores_F)} scores, the model {width} channels"
            )
    kept = [kept_channels(scores_F, keep) for scores_F in scores]
    summary = summarize(
        checkpoint,
        options,
        [share_kept(scores_F, kept_K) for scores_F, kept_K in zip(scores, kept, strict=True)],
        keep,
    )
    _begin(out, kept, summary)
    for index, kept_K in enumerate(kept):
        path = out / layer_file(index)
        if keep < width and not path.is_file():
            with whole_file(path) as temporary:
                names = checkpoint.family.ffn_names(index)
                matrices = {
                    name: pruned_matrix(checkpoint, index, name, kept_K, options.mode) for name in names
                }
                write_tensors(temporary, matrices)
        progress(index + 1, count)


def _begin(out: Path, kept: list[torch.Tensor], summary: dict[str, Any]) -> None:
    """Write what was decided, and drop the matrices that an earlier prune left by another decision."""
    decided = {f"layers.{index}.kept": kept_K for index, kept_K in enumerate(kept)}
    with whole_file(out / f"{KEPT}.new") as temporary:
        write_tensors(temporary, decided)
    new, old = out / f"{KEPT}.new", out / KEPT
    same = old.is_file() and old.read_bytes() == new.read_bytes()
    if not (same and (out / SUMMARY).is_file() and read_json(out / SUMMARY)["mode"] == summary["mode"]):
        for path in out.glob("layer-*.safetensors"):
            path.unlink()
    write_json(out / SUMMARY, summary)
    new.replace(old)


def share_kept(scores_F: torch.Tensor, kept_K: torch.Tensor) -> float:
    """Which share of a layer's importance stays."""
    return float(scores_F[kept_K].sum() / scores_F.sum().clamp_min(torch.finfo(scores_F.dtype).tiny))


def summarize(
    checkpoint: Checkpoint, options: PruneOptions, shares: list[float], keep: int, mean: float | None = None
) -> dict[str, Any]:
    """What `prune.json` says of a model in which `keep` channels of every layer stay; or that many at most, `mean` on
    average."""
    width = checkpoint.ffn_width
    mean = keep if mean is None else mean
    return {
        "mode": options.mode,
        "ratio": options.ratio,
        "multiple_of": options.multiple_of,
        "layers": checkpoint.layer_count,
        "hidden_size": checkpoint.hidden_size,
        "width": width,
        "kept_width": keep,
        "removed_share": 1 - mean / width,
        "importance_kept_share": shares,
        **(options.model_dump(include=set(options.identity()) & _BEYOND) if options.walks else {}),
    }


def pruned_matrix(
    checkpoint: Checkpoint,
    layer: int,
    name: str,
    kept_K: torch.Tensor,
    mode: str,
    changed: torch.Tensor | None = None,
    padded_to: int = 0,
) -> torch.Tensor:
    """Gate [F, H], up [F, H] or down [H, F] of a layer without the other channels.

    Args:
        checkpoint: the model.
        layer: the decoder layer.
        name: Hugging Face name of one of its three feed-forward matrices.
        kept_K: int64 [K], the channels that stay.
        mode: `physical` slices (K in place of F), `mask` zeroes.
        changed: what stands in place of the kept rows or columns, in their dtype; None for themselves.
        padded_to: in physical mode, zeros follow up to so many channels.

    Raises:
        CameraError: if the matrix holds NaN or infinity.
    """
    dim = 1 if name == checkpoint.family.ffn_names(layer)[2] else 0
    if changed is not None:
        if mode == "physical":
            return _padded(changed, dim, padded_to)
        return changed.new_zeros(checkpoint.tensors[name].shape).index_copy_(dim, kept_K, changed)
    matrix = checkpoint.read_finite(name)
    if mode == "physical":
        kept = gather_channels(matrix, kept_K) if dim == 1 else matrix.index_select(0, kept_K)
        return _padded(kept, dim, padded_to)
    stays_F = torch.zeros(matrix.shape[dim], dtype=torch.bool)
    stays_F[kept_K] = True
    return torch.where(stays_F if dim == 1 else stays_F[:, None], matrix, torch.zeros((), dtype=matrix.dtype))


def _padded(matrix: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The matrix with zeros after its rows or columns, up to `size` of them."""
    missing = size - matrix.shape[dim]
    if missing <= 0:
        return matrix
    zeros = matrix.new_zeros([missing if at == dim else length for at, length in enumerate(matrix.shape)])
    return torch.cat([matrix, zeros], dim)


def layer_file(index: int) -> str:
    return f"layer-{index:04d}.safetensors"
