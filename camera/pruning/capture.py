"""Activation capture: statistics of every micro-expert from one streamed pass over the calibration tokens."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.devices import resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.files import whole_file, write_json
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.importance import importance, kept_channels, kept_width
from camera.pruning.statistics import (
    LayerStatistics,
    statistics_from,
    statistics_tensors,
    write_statistics,
)
from camera.pruning.walk import LayerWalk

STATISTICS = "statistics.safetensors"
_RESUME = "resume.safetensors"
_ACTIVATION_BUDGET_BYTES = 1 << 30


@dataclass(frozen=True)
class Selection:
    """What sequential propagation must know to prune a layer while it walks."""

    reduce_ratio: float
    kept: int


def selection_of(checkpoint: Checkpoint, options: CaptureOptions, prune: PruneOptions) -> Selection | None:
    """The selection that capture depends on: none in one-shot mode, whose statistics serve every ratio."""
    if options.propagate == "one-shot":
        return None
    return Selection(prune.reduce_ratio, kept_width(checkpoint.ffn_width, prune.ratio, prune.multiple_of))


def capture(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    options: CaptureOptions,
    selection: Selection | None = None,
    progress: Progress = silent,
    save_every_seconds: float = 20.0,
) -> None:
    """Write `statistics.safetensors` and `capture.json` into the folder `out`.

    In sequential propagation (a selection is given) each layer's channels are selected as soon as its
    statistics are complete, and the next layer sees what the pruned layer puts out. The layer runs once: its
    activations are kept, and only the down projection is computed again on the kept channels.

    Args:
        checkpoint: the model.
        tokens_ST: int64 [samples, tokens].
        out: an existing folder. A killed capture that left its state here goes on at the layer it was in.
        options: batch size, dtype and device.
        selection: for sequential propagation.
        progress: told (samples done × layers, all).
        save_every_seconds: how often the state is saved for a resume.

    Raises:
        CameraError: for weights or activations with NaN or infinity, and tokens outside the vocabulary.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint.dtype)
    walk = LayerWalk(checkpoint, device, dtype)
    samples, length = tokens_ST.shape
    if length > int(checkpoint.config.get("max_position_embeddings", length)):
        raise CameraError(
            f"calibration windows of {length} tokens exceed the model's "
            f"{checkpoint.config['max_position_embeddings']} positions: lower the length"
        )
    call = walk.caller(length)
    layers, hidden_STH = _resumed(out / _RESUME, checkpoint.layer_count) or ([], walk.embed(tokens_ST))
    saved = time.monotonic()
    with torch.inference_mode():
        for index in range(len(layers), checkpoint.layer_count):
            done = index * samples

            def tell(count: int, done: int = done) -> None:
                progress(done + count, samples * checkpoint.layer_count)

            select = None if selection is None else partial(_select, checkpoint, index, selection)
            with walk.layer(index) as layer:
                layers.append(
                    _capture_layer(layer, call, hidden_STH, index, options.batch_size, select, tell)
                )
            if time.monotonic() - saved > save_every_seconds and index + 1 < checkpoint.layer_count:
                _save_state(out / _RESUME, layers, hidden_STH)
                saved = time.monotonic()
    write_statistics(out / STATISTICS, layers)
    write_json(
        out / "capture.json",
        {
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "layers": len(layers),
            "ffn_width": checkpoint.ffn_width,
            "propagate": "one-shot" if selection is None else "sequential",
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
        },
    )
    (out / _RESUME).unlink(missing_ok=True)
    progress(samples * checkpoint.layer_count, samples * checkpoint.layer_count)


def _select(
    checkpoint: Checkpoint, index: int, selection: Selection, statistics: LayerStatistics
) -> torch.Tensor:
    """The channels of one layer that stay, int64 [kept] on the CPU.

    Scored with the checkpoint's own matrix: bit for bit the scores that prune will use, though the layer
    computes in another dtype, or on a device without float64.
    """
    down_HF = checkpoint.read(checkpoint.family.ffn_names(index)[2])
    return kept_channels(importance(statistics, down_HF, selection.reduce_ratio), selection.kept)


class _Recorder(nn.Module):
    """Stands in for `down_proj`: sees the activations that enter it, and lets them through or not."""

    def __init__(self, down: nn.Linear, see: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.down = down
        self.see = see

    def forward(self, act_BTF: torch.Tensor) -> torch.Tensor:
        if self.see(act_BTF):
            return self.down(act_BTF)
        # Zeros in place of the FFN's output: the layer then returns its residual stream alone.
        return act_BTF.new_zeros(*act_BTF.shape[:-1], self.down.out_features)


def _capture_layer(
    layer: nn.Module,
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    hidden_STH: torch.Tensor,
    index: int,
    batch_size: int,
    select: Callable[[LayerStatistics], torch.Tensor] | None,
    tell: Callable[[int], None],
) -> LayerStatistics:
    """Statistics of one layer; `hidden_STH` is replaced, in place, by what the (pruned) layer puts out."""
    mlp: nn.Module = layer.mlp  # type: ignore[assignment]
    down: nn.Linear = mlp.down_proj  # type: ignore[assignment]
    device = down.weight.device
    statistics = LayerStatistics.zeros(down.in_features)
    batches = [slice(start, start + batch_size) for start in range(0, len(hidden_STH), batch_size)]
    held: dict[int, torch.Tensor] = {}  # activations by batch, as many as the budget allows
    room = _ACTIVATION_BUDGET_BYTES

    def see(act_BTF: torch.Tensor) -> bool:
        nonlocal room
        statistics.update(act_BTF)
        if select is None:
            return True
        if act_BTF.nbytes <= room:
            room -= act_BTF.nbytes
            held[number] = act_BTF
        return False

    mlp.down_proj = _Recorder(down, see)
    for number, batch in enumerate(batches):
        out_BTH = call(layer, hidden_STH[batch].to(device))
        if select is None or number in held:  # the layer's output, or its residual stream
            hidden_STH[batch] = out_BTH.to(hidden_STH.device)
        tell(min(batch.stop, len(hidden_STH)))
    mlp.down_proj = down
    statistics.check_finite(index)
    if select is None:
        return statistics

    kept = select(statistics).to(device)
    kept_down_HK = down.weight[:, kept]
    for number, batch in enumerate(batches):
        if number in held:
            ffn_BTH = nn.functional.linear(held.pop(number)[..., kept], kept_down_HK, down.bias)
            out_BTH = hidden_STH[batch].to(device) + ffn_BTH
        else:
            _narrow(mlp, kept)
            out_BTH = call(layer, hidden_STH[batch].to(device))
        hidden_STH[batch] = out_BTH.to(hidden_STH.device)
    return statistics


def _narrow(mlp: nn.Module, kept: torch.Tensor) -> None:
    """Slice a gated FFN in place to its kept channels, once."""
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        linear: nn.Linear = getattr(mlp, name)
        if linear.weight.shape[dim] != len(kept):
            linear.weight = nn.Parameter(linear.weight.index_select(dim, kept), requires_grad=False)


def _save_state(path: Path, layers: list[LayerStatistics], hidden_STH: torch.Tensor) -> None:
    with whole_file(path) as temporary:
        write_tensors(temporary, {**statistics_tensors(layers), "hidden": hidden_STH})


def _resumed(path: Path, layer_count: int) -> tuple[list[LayerStatistics], torch.Tensor] | None:
    """The state that a killed capture saved, if there is one and it is whole."""
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
        hidden = tensors.pop("hidden")
        count = len(tensors) // 2
        if count > layer_count:
            return None
        return statistics_from(tensors, count, path), hidden
    except (CameraError, KeyError):
        return None
