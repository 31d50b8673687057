"""Rounding to blocks from disk to disk, on the device and on the host, and GPTQ of one layer."""

import shutil
from time import perf_counter

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.device_check.context import Context
from camera.engines.parts.int4_linear import INT4_TYPES
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint

_FEW_WORDS = 320
"""Rows of the embedding where the layers are what matters."""


def run(context: Context) -> None:
    """The second of two runs counts: the first loads kernels."""
    shapes, device = context.shapes, context.options.device
    source = Checkpoint.open(
        write_checkpoint(context.scratch / "model", **shapes.sizes(shapes.walk_layers), dtype=torch.bfloat16)
    )
    size = sum((source.folder / name).stat().st_size for name in source.weight_files)
    for type in INT4_TYPES:
        for where in (device, "cpu"):
            seconds = _seconds(context, source, QuantizeOptions(type=type, device=where))
            context.measure("rounding", size / seconds / 1e9, "GB/s", type=type, device=where)
    shutil.rmtree(source.folder)
    sizes = shapes.sizes(1) | {"vocab": _FEW_WORDS}
    layer = Checkpoint.open(write_checkpoint(context.scratch / "layer", **sizes, dtype=torch.bfloat16))
    random = torch.Generator().manual_seed(0)
    tokens_ST = torch.randint(_FEW_WORDS, (shapes.samples, shapes.length), generator=random)
    options = QuantizeOptions(method="gptq", device=device, batch_size=shapes.batch)
    context.measure("calibration tokens", tokens_ST.numel())
    context.measure("GPTQ of a layer", _seconds(context, layer, options, tokens_ST), "s")


def _seconds(
    context: Context,
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    tokens_ST: torch.Tensor | None = None,
) -> float:
    for _ in range(2):
        began = perf_counter()
        quantize_checkpoint(checkpoint, context.scratch / "packed", options, tokens_ST)
        seconds = perf_counter() - began
        shutil.rmtree(context.scratch / "packed")
    return seconds
