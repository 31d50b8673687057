"""What a walk will take, from the config and a short trial on this device: one batch through one layer.

A surgery adds its Gram matrices to the trial. Its decision is not tried, which would take as long as in one layer of the
walk: its multiplications are counted, and the device is timed on a small product.
"""

import time
from dataclasses import dataclass

import psutil
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import memory_bytes, resolve_device, resolve_dtype, synchronize
from camera.heap import SLACK_BYTES
from camera.layerwise.feed_forward import ACTIVATION_BUDGET_BYTES, trial
from camera.layerwise.gram import LayerGram
from camera.layerwise.runner import LayerRunner
from camera.options import CaptureOptions
from camera.pruning.propagate import Selection
from camera.pruning.surgery import Surgery, exact_device

_PROBE = 512
_FACTOR_SLOWNESS = 3
"""A factorisation makes about a third of the multiplications a second that a matrix product makes."""


@dataclass(frozen=True)
class WalkEstimate:
    """Predicted cost of a capture."""

    seconds: float
    peak_bytes: int
    """Resident in this process, Python and its libraries included; on an accelerator what is on the device."""
    process_bytes: int
    """Of it, what this process had before any weight; another process may hold other libraries."""


def estimate_walk(
    checkpoint: Checkpoint,
    samples: int,
    length: int,
    options: CaptureOptions,
    selection: Selection | None,
    surgery: Surgery | None = None,
    steps: int = 1,
) -> WalkEstimate:
    """Try one batch in the first layer, twice, and count layers and batches.

    Args:
        checkpoint: the model.
        samples, length: of the calibration tokens.
        options: batch size, dtype, device, number of devices.
        selection: for sequential propagation.
        surgery: what is decided from the Gram matrix of each layer.
        steps: walks through the model, taken to be alike.

    Raises:
        CameraError: if the device is not there or the layer does not load.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint.dtype)
    begun = time.perf_counter()
    walk = LayerRunner(checkpoint, device, dtype)
    # Not after the trial, which leaves freed memory and mapped weights that are counted by themselves.
    process = 0 if device.type != "cpu" else psutil.Process().memory_info().rss
    batch = min(options.batch_size, samples)
    tokens_BT = (
        torch.arange(batch * length).remainder(int(checkpoint.config["vocab_size"])).view(batch, length)
    )
    by_gram = surgery is not None and surgery.needs_gram
    gram = LayerGram(checkpoint.ffn_width, device) if by_gram else None
    with torch.inference_mode():
        hidden_BTH = walk.embed(tokens_BT)
        starting = time.perf_counter() - begun
        kept = None if selection is None else selection.kept
        trial(
            walk, hidden_BTH, batch, kept, gram
        )  # the first use of kernels and pages is slower than the rest
        synchronize(device)
        started = time.perf_counter()
        computing = trial(walk, hidden_BTH, batch, kept, gram)
        synchronize(device)
        whole = time.perf_counter() - started
    mine = -(-samples // options.devices)
    batches = mine / batch
    deciding = 0.0 if surgery is None else _deciding_seconds(checkpoint, surgery, exact_device(device))
    seconds = starting + checkpoint.layer_count * (whole - computing + computing * batches + deciding)
    before = memory_bytes(device) if device.type != "cpu" else process
    needed = _needed(checkpoint, dtype, device, mine, length, batch, selection, surgery)
    return WalkEstimate(steps * seconds, before + needed, process)


def _deciding_seconds(checkpoint: Checkpoint, surgery: Surgery, device: torch.device) -> float:
    """How long one layer's choice and refit take, in float64."""
    width, hidden, kept = checkpoint.ffn_width, checkpoint.hidden_size, surgery.kept
    removed = width - kept
    if not surgery.needs_gram:
        return 0.0
    products = 3 * hidden * width**2  # errors on held-back tokens, and the way of the matrices to float64
    if surgery.score == "obs":
        products += _FACTOR_SLOWNESS * width**3 + removed * width * (width + hidden)
    if surgery.refit:
        products += 2 * (_FACTOR_SLOWNESS * kept**3 // 3 + kept**2 * hidden + kept * removed * hidden)
    probe = torch.rand(_PROBE, _PROBE, dtype=torch.float64, device=device)
    probe @ probe
    synchronize(device)
    started = time.perf_counter()
    probe @ probe
    synchronize(device)
    return products * (time.perf_counter() - started) / _PROBE**3


def _needed(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    samples: int,
    length: int,
    batch: int,
    selection: Selection | None,
    surgery: Surgery | None,
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
    grams = deciding = 0
    if surgery is not None and surgery.needs_gram:
        grams = 2 * 4 * width**2
        deciding = held
        if exact_device(device) == device:  # the matrix in float64, its inverse, and what either is made from
            deciding += 3 * 8 * width**2 + 3 * 8 * hidden * width
    needed = weights + states + max(grams + computing + held, held + kept_down + act, grams + deciding)
    return (
        needed if device.type != "cpu" else needed + min(needed, SLACK_BYTES)
    )  # freed, and kept by the heap
