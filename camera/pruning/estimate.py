"""What a walk will take, from the config and a short trial on this device: one batch through one layer."""

import time
from dataclasses import dataclass

import psutil
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import memory_bytes, resolve_device, resolve_dtype, synchronize
from camera.options import CaptureOptions
from camera.pruning.propagate import ACTIVATION_BUDGET_BYTES, Selection, trial
from camera.pruning.walk import LayerWalk


@dataclass(frozen=True)
class WalkEstimate:
    """Predicted cost of a capture."""

    seconds: float
    peak_bytes: int
    """Resident in this process, Python and its libraries included; on an accelerator what is on the device."""


def estimate_walk(
    checkpoint: Checkpoint, samples: int, length: int, options: CaptureOptions, selection: Selection | None
) -> WalkEstimate:
    """Try one batch in the first layer, twice, and count layers and batches.

    Args:
        checkpoint: the model.
        samples, length: of the calibration tokens.
        options: batch size, dtype, device, number of devices.
        selection: for sequential propagation.

    Raises:
        CameraError: if the device is not there or the layer does not load.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint.dtype)
    begun = time.perf_counter()
    walk = LayerWalk(checkpoint, device, dtype)
    batch = min(options.batch_size, samples)
    tokens_BT = (
        torch.arange(batch * length).remainder(int(checkpoint.config["vocab_size"])).view(batch, length)
    )
    with torch.inference_mode():
        hidden_BTH = walk.embed(tokens_BT)
        starting = time.perf_counter() - begun
        trial(
            walk, hidden_BTH, batch, selection
        )  # the first use of kernels and pages is slower than the rest
        synchronize(device)
        started = time.perf_counter()
        computing = trial(walk, hidden_BTH, batch, selection)
        synchronize(device)
        whole = time.perf_counter() - started
    mine = -(-samples // options.devices)
    batches = mine / batch
    seconds = starting + checkpoint.layer_count * (whole - computing + computing * batches)
    return WalkEstimate(seconds, _peak(checkpoint, dtype, device, mine, length, batch, selection))


def _peak(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    samples: int,
    length: int,
    batch: int,
    selection: Selection | None,
) -> int:
    """Weights of a layer, hidden states, activations that are kept, and what one batch needs while it is computed."""
    width, hidden = checkpoint.ffn_width, checkpoint.hidden_size
    stored = sum(checkpoint.tensors[name].size_bytes for name in checkpoint.layer_tensors(0))
    weights = stored
    if device.type != "cpu":
        weights = round(2 * stored * dtype.itemsize / checkpoint.dtype.itemsize)  # and the next, read ahead
    elif dtype != checkpoint.dtype:
        largest = hidden * width * checkpoint.dtype.itemsize
        weights = round(stored * dtype.itemsize / checkpoint.dtype.itemsize) + largest
    states = samples * length * hidden * dtype.itemsize
    act = batch * length * width * dtype.itemsize
    # gate, its activation, up and their product; queries, keys, values and norms; float32 statistics of a sample
    computing = 4 * act + 8 * batch * length * hidden * dtype.itemsize + 3 * length * width * 4
    held = kept_down = 0
    if selection is not None:
        held = min(ACTIVATION_BUDGET_BYTES, samples * length * width * dtype.itemsize)
        kept_down = 2 * hidden * selection.kept * dtype.itemsize
    base = memory_bytes(device) if device.type != "cpu" else psutil.Process().memory_info().rss
    return base + weights + states + max(computing + held, held + kept_down + act)
