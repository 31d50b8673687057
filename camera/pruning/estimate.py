"""What a capture will take, from the config and a short trial on this device: one batch through one layer.

A method that needs Gram matrices adds them to the trial. Its decision is not tried, which would take as long as in one
layer of the capture: its multiplications are counted, and the device is timed on a small product.
"""

import time
from dataclasses import dataclass

import psutil
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import exact_device, memory_bytes, resolve_device, resolve_dtype, synchronize
from camera.heap import SLACK_BYTES
from camera.layerwise.experts_pass import CHUNK_BYTES, Buffers, ExpertsPass
from camera.layerwise.feed_forward import FeedForwardPass, LayerPass, Samples, activation_room
from camera.layerwise.gram import LayerGram, Target
from camera.layerwise.runner import LayerRunner
from camera.options import CaptureOptions
from camera.pruning.plan import PrunePlan
from camera.registry import PRUNING_METHODS

_PROBE = 512


@dataclass(frozen=True)
class CaptureEstimate:
    """Predicted cost of a capture."""

    seconds: float
    peak_bytes: int
    """Resident in this process, Python and its libraries included; on an accelerator what is on the device."""
    process_bytes: int
    """Of it, what this process had before any weight; another process may hold other libraries."""


def estimate_capture(
    checkpoint: Checkpoint, samples: int, length: int, options: CaptureOptions, plan: PrunePlan
) -> CaptureEstimate:
    """Try one batch in the first layer, twice, and count layers and batches.

    Args:
        checkpoint: the model.
        samples, length: of the calibration tokens.
        options: batch size, dtype, device, number of devices.
        plan: what is decided.

    Raises:
        CameraError: if the device is not there or the layer does not load.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint.dtype)
    begun = time.perf_counter()
    runner = LayerRunner(checkpoint, device, dtype)
    # Not after the trial, which leaves freed memory and mapped weights that are counted by themselves.
    process = 0 if device.type != "cpu" else psutil.Process().memory_info().rss
    batch = min(options.batch_size, samples)
    tokens_BT = (
        torch.arange(batch * length).remainder(int(checkpoint.config["vocab_size"])).view(batch, length)
    )
    gram = None
    if plan.needs_gram:
        target = None
        if plan.streams > 1:
            target = Target(plan.width, checkpoint.hidden_size, device, None)
        gram = LayerGram(plan.width, device, target)
    with torch.inference_mode():
        hidden_BTH = runner.embed(tokens_BT)
        starting = time.perf_counter() - begun
        # The first use of kernels and pages is slower than the rest.
        _trial(runner, plan, hidden_BTH, gram)
        synchronize(device)
        started = time.perf_counter()
        computing = _trial(runner, plan, hidden_BTH, gram)
        synchronize(device)
        whole = time.perf_counter() - started
    mine = -(-samples // options.devices)
    batches = mine / batch
    deciding = _deciding_seconds(plan, checkpoint.hidden_size, exact_device(device)) * max(
        1, plan.experts_kept
    )
    seconds = starting + checkpoint.layer_count * (whole - computing + computing * batches + deciding)
    before = memory_bytes(device) if device.type != "cpu" else process
    needed = _needed(checkpoint, plan, (dtype, device), (mine, length, batch))
    return CaptureEstimate(seconds, before + needed, process)


def tried_layer(checkpoint: Checkpoint) -> int:
    """The layer that stands for all: the first that routes its tokens to experts, or the first."""
    layers = range(checkpoint.layer_count)
    return next((layer for layer in layers if checkpoint.is_sparse(layer)), 0)


def _trial(runner: LayerRunner, plan: PrunePlan, hidden_BTH: torch.Tensor, gram: LayerGram | None) -> float:
    """Run a layer on one batch as a capture does; the seconds without loading it."""
    index, call = tried_layer(runner.checkpoint), runner.caller(hidden_BTH.shape[1])
    source = hidden_BTH.clone() if plan.streams > 1 else None
    samples = Samples(hidden_BTH.clone(), len(hidden_BTH), [False] * len(hidden_BTH), source_STH=source)
    with runner.layer(index) as module:
        started = time.perf_counter()
        run: LayerPass
        if runner.checkpoint.is_sparse(index):
            buffers = Buffers(hidden_BTH, lambda: torch.empty_like(hidden_BTH))
            run = ExpertsPass(runner, index, module, call, samples, buffers)
        else:
            (block,) = runner.checkpoint.blocks(index)
            run = FeedForwardPass(module, block, call, samples, sequential=plan.sequential, last=False)
        for block in run.blocks:
            width = block.width(runner.checkpoint.config)
            run.observe(block, gram if width == plan.width else None)
            run.put_out(block, torch.arange(plan.kept_of(block, width)) if plan.sequential else None, {})
        run.finish()
        return time.perf_counter() - started


def _deciding_seconds(plan: PrunePlan, hidden: int, device: torch.device) -> float:
    """How long one layer's decision takes, in float64."""
    if not plan.needs_gram:
        return 0.0
    products: float = PRUNING_METHODS[plan.method].multiplications(
        plan.width, hidden, plan.kept, len(plan.dampings)
    )
    probe = torch.rand(_PROBE, _PROBE, dtype=torch.float64, device=device)
    probe @ probe
    synchronize(device)
    started = time.perf_counter()
    probe @ probe
    synchronize(device)
    return products * (time.perf_counter() - started) / _PROBE**3


def _needed(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    place: tuple[torch.dtype, torch.device],
    tokens: tuple[int, int, int],
) -> int:
    """Weights of a layer, hidden states, activations that are kept, and what one batch needs while it is computed."""
    (dtype, device), (samples, length, batch) = place, tokens
    width, hidden = checkpoint.ffn_width, checkpoint.hidden_size
    layer = tried_layer(checkpoint)
    sparse = checkpoint.is_sparse(layer)
    experts = [block for block in checkpoint.blocks(layer) if block.expert is not None]
    apart = {name for block in experts[1:] for name in block.names}  # one expert at a time
    stored = sum(
        checkpoint.tensors[name].size_bytes for name in checkpoint.layer_tensors(layer) if name not in apart
    )
    weights = stored
    if device.type != "cpu":
        weights = round(2 * stored * dtype.itemsize / checkpoint.dtype.itemsize)  # and the next, read ahead
    elif dtype != checkpoint.dtype:
        largest = hidden * width * checkpoint.dtype.itemsize
        weights = round(stored * dtype.itemsize / checkpoint.dtype.itemsize) + largest
    states = (3 if sparse else plan.streams) * samples * length * hidden * dtype.itemsize
    act = (
        min(CHUNK_BYTES, samples * length * width * dtype.itemsize)
        if sparse
        else batch * length * width * dtype.itemsize
    )
    # gate, its activation, up and their product; queries, keys, values and norms; float32 statistics of a sample
    computing = 4 * act + 8 * batch * length * hidden * dtype.itemsize + 3 * length * width * 4
    held = kept_down = 0
    if plan.sequential:
        visits = samples * length
        if checkpoint.experts is not None and sparse:  # on average; twice that for an uneven router
            visits = min(visits, 2 * visits * checkpoint.experts.chosen(checkpoint.config) // len(experts))
        held = min(activation_room(device), visits * width * dtype.itemsize)
        kept_down = 2 * hidden * plan.kept * dtype.itemsize
    grams = deciding = 0
    if plan.needs_gram:
        grams = 2 * 4 * width**2
        if plan.streams > 1:  # with the targets, and what the source puts out for a batch
            grams += 2 * 4 * width * hidden + 3 * 4 * batch * length * hidden
        deciding = held
        if exact_device(device) == device:  # the matrix in float64, and its factor or inverse
            deciding += 2 * 8 * width**2 + 3 * 8 * hidden * width
    needed = weights + states + max(grams + computing + held, held + kept_down + act, grams + deciding)
    # What is freed and kept by the C library's heap.
    return needed if device.type != "cpu" else needed + min(needed, SLACK_BYTES)
