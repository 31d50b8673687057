"""Pruning layer by layer at real shapes: time beside a plain forward pass of the same layers, and memory."""

import shutil
from time import perf_counter

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.device_check.context import Context
from camera.devices import peak_memory_bytes, release_memory, reset_peak_memory, synchronize
from camera.errors import CameraError
from camera.loading import load_model
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.units import bytes_text

_COPIES = 2.5
"""Of the model on the disk: it, the pruned one, and the state of the walk."""


def run(context: Context) -> None:
    """Write a checkpoint of random weights, run it, and prune it, one-shot and sequentially."""
    shapes, device = context.shapes, context.device
    sizes = shapes.sizes(shapes.walk_layers) | {"vocab": shapes.walk_vocab}
    layer = 2 * shapes.hidden * (3 * shapes.ffn + 3 * shapes.hidden)
    need = int(_COPIES * (shapes.walk_layers * layer + 4 * shapes.hidden * shapes.walk_vocab))
    if (free := shutil.disk_usage(context.scratch).free) < need:
        raise CameraError(f"the disk has {bytes_text(free)} free, and the walk needs {bytes_text(need)}")
    checkpoint = Checkpoint.open(write_checkpoint(context.scratch / "model", **sizes, dtype=torch.bfloat16))
    random = torch.Generator().manual_seed(0)
    tokens_ST = torch.randint(shapes.walk_vocab, (shapes.samples, shapes.length), generator=random)
    context.measure("calibration tokens", tokens_ST.numel())
    _plain_forward(context, checkpoint, tokens_ST)
    for propagate in ("one-shot", "sequential"):
        reset_peak_memory(device)
        out = context.scratch / "pruned"
        capture = CaptureOptions(propagate=propagate, batch_size=shapes.batch, device=str(device))
        began = perf_counter()
        prune_checkpoint(checkpoint, tokens_ST, out, capture, PruneOptions(ratio=0.2))
        context.measure("pruning", perf_counter() - began, "s", propagation=propagate)
        context.measure("peak memory", peak_memory_bytes(device), "B", propagation=propagate)
        shutil.rmtree(out)


@torch.inference_mode()
def _plain_forward(context: Context, checkpoint: Checkpoint, tokens_ST: torch.Tensor) -> None:
    """The second of two passes: the first loads kernels."""
    began = perf_counter()
    decoder = load_model(checkpoint.folder, "auto", str(context.device)).get_decoder()
    synchronize(context.device)
    context.measure("loading the model", perf_counter() - began, "s")
    for _ in range(2):
        began = perf_counter()
        for batch_BT in tokens_ST.split(context.shapes.batch):
            decoder(batch_BT.to(context.device), use_cache=False)
        synchronize(context.device)
    context.measure("plain forward pass", perf_counter() - began, "s")
    del decoder
    release_memory(context.device)
