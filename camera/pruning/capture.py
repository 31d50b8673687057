"""Activation capture: statistics of every micro-expert from one streamed pass over the calibration tokens."""

from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import dtype_name, resolve_device, resolve_dtype
from camera.files import write_json
from camera.layerwise.collectives import Collectives, ranks
from camera.layerwise.resume import clear_states
from camera.layerwise.statistics import LayerStatistics, write_statistics
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.propagate import Selection, propagate

STATISTICS = "statistics.safetensors"


def capture(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    options: CaptureOptions,
    selection: Selection | None = None,
    progress: Progress = silent,
) -> None:
    """Write `statistics.safetensors` and `capture.json` into the folder `out`.

    Args:
        checkpoint: the model.
        tokens_ST: int64 [samples, tokens].
        out: an existing folder. A killed capture that left its state here goes on at the layer it was in.
        options: batch size, dtype, device, and over how many devices the samples are split.
        selection: for sequential propagation; None for one-shot.
        progress: told (samples done × layers, all).

    Raises:
        CameraError: as `camera.pruning.propagate.propagate`.
    """
    arguments = (checkpoint.folder, tokens_ST, out, options, selection)
    with ranks(options.devices, _help, *arguments) as us:
        visits = propagate(checkpoint, tokens_ST, options, selection, out, ranks=us, progress=progress)
        layers = [visit.statistics for visit in visits]
    write_captured(checkpoint, tokens_ST, out, options, layers, sequential=selection is not None)
    clear_states(out)


def write_captured(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    options: CaptureOptions,
    layers: list[LayerStatistics],
    *,
    sequential: bool,
) -> None:
    """Write what `capture` writes, of statistics that were gathered."""
    write_statistics(out / STATISTICS, layers)
    samples, length = tokens_ST.shape
    write_json(
        out / "capture.json",
        {
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "layers": len(layers),
            "ffn_width": checkpoint.ffn_width,
            "propagate": "sequential" if sequential else "one-shot",
            "dtype": dtype_name(resolve_dtype(options.dtype, checkpoint.dtype)),
            "device": resolve_device(options.device).type,
        },
    )


def _help(
    us: Collectives,
    folder: Path,
    tokens_ST: torch.Tensor,
    out: Path,
    options: CaptureOptions,
    selection: Selection | None,
) -> None:
    """What the other ranks do: the same walk over their samples."""
    for _ in propagate(Checkpoint.open(folder), tokens_ST, options, selection, out, ranks=us):
        pass
