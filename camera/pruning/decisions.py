"""What is decided for every layer of a model while it is walked: which channels stay, and their down projection.

One walk, whatever the method: CAMERA's choice needs the statistics alone, a surgery the Gram matrix too. What a surgery
decided cannot be computed again from a walk's saved state, so it is noted layer by layer beside it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.layerwise.collectives import Collectives, ranks
from camera.layerwise.statistics import LayerStatistics, gather_channels
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress
from camera.pruning.importance import importance, kept_channels
from camera.pruning.propagate import Selection, Visit, propagate
from camera.pruning.surgery import ROLES, Surgery, surgery_of


@dataclass(frozen=True)
class Decision:
    """What is decided for one layer."""

    layer: int
    statistics: LayerStatistics
    scores_F: torch.Tensor
    """CAMERA's importance, float64 [F] on the CPU."""
    kept_K: torch.Tensor
    """int64 [K] on the CPU, ascending: channels of the model that was walked."""
    matrices: dict[str, torch.Tensor]
    """By Hugging Face name, of the kept channels: those that are no slices of the walked model's; none if resumed."""
    record: dict[str, Any] | None
    """A surgery's record, for `prune.json`."""
    resumed: bool
    """Whether an earlier, killed walk decided it, so that its matrices are written."""

    def of_slice(self, walked: Checkpoint) -> "Decision":
        """The same with the slice of the walked model's down projection made explicit, where it is one."""
        name = walked.family.ffn_names(self.layer)[2]
        if self.resumed or name in self.matrices:
            return self
        return replace(
            self, matrices={**self.matrices, name: gather_channels(walked.read(name), self.kept_K)}
        )


def decide(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    work: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    widths: tuple[int, ...],
    before_saving: Callable[[], None],
    progress: Progress,
) -> Iterator[Decision]:
    """Walk a model and decide layer by layer; what is yielded is to be written before the next is asked for.

    Args:
        checkpoint: the model to walk.
        tokens_ST: int64 [samples, tokens].
        work: an existing folder for the walk's state and notes.
        capture: how to walk.
        options: how to choose.
        widths: FFN channels that stay in each layer.
        before_saving, progress: as for `propagate`.

    Raises:
        CameraError: as `propagate`.
    """
    keep, of_layers = max(widths), widths if len(set(widths)) > 1 else ()
    selection = None if capture.propagate == "one-shot" else Selection(options.reduce_ratio, keep, of_layers)
    surgery = surgery_of(checkpoint.ffn_width, keep, options, of_layers)
    arguments = (checkpoint.folder, tokens_ST, work, capture, selection, surgery)
    with ranks(capture.devices, _help, *arguments) as us:
        for visit in propagate(
            checkpoint,
            tokens_ST,
            capture,
            selection,
            work,
            surgery=surgery,
            ranks=us,
            before_saving=before_saving,
            progress=progress,
        ):
            down_HF = checkpoint.read_finite(checkpoint.family.ffn_names(visit.layer)[2])
            scores_F = importance(visit.statistics, down_HF, options.reduce_ratio)
            record, matrices = None, {}
            if surgery is None:
                kept_K = kept_channels(scores_F, widths[visit.layer])
            else:
                kept_K, record = _noted(work, visit)
            if visit.cut is not None:
                names = dict(zip(ROLES, checkpoint.family.ffn_names(visit.layer), strict=True))
                matrices = {names[role]: matrix for role, matrix in visit.cut.matrices.items()}
            yield Decision(
                visit.layer, visit.statistics, scores_F, kept_K, matrices, record, resumed=visit.resumed
            )


def _noted(work: Path, visit: Visit) -> tuple[torch.Tensor, dict[str, Any]]:
    """A surgery's decision, noted now or by an earlier walk."""
    path = work / f"cut-{visit.layer:04d}.json"
    if visit.cut is not None:
        cut = visit.cut
        write_json(path, {"kept": cut.kept_K.tolist(), "record": asdict(cut.record)})
        return cut.kept_K, asdict(cut.record)
    try:
        note = read_json(path)
        return torch.tensor(note["kept"], dtype=torch.int64), note["record"]
    except (CameraError, KeyError, TypeError) as error:
        raise CameraError(f"{path} is damaged: remove {work} and begin again ({error})") from None


def _help(
    us: Collectives,
    folder: Path,
    tokens_ST: torch.Tensor,
    work: Path,
    capture: CaptureOptions,
    selection: Selection | None,
    surgery: Surgery | None,
) -> None:
    """What the other ranks do: the same walk over their samples."""
    for _ in propagate(
        Checkpoint.open(folder), tokens_ST, capture, selection, work, surgery=surgery, ranks=us
    ):
        pass
