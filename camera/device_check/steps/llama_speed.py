"""llama.cpp's speed at real shapes, with its graphs and without."""

import os
import shutil
import statistics
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.device_check.context import Context
from camera.engines.llama_cpp import LlamaCppEngine
from camera.errors import CameraError
from camera.formats.convert import convert_to_gguf
from camera.options import BenchmarkOptions, BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint

_GRAPH = "GGML_CANN_ACL_GRAPH"
_KINDS: tuple[tuple[BlockType, bool], ...] = (("q4_0", False), ("q4_0_64", True))


def run(context: Context, build: str) -> None:
    """Time Q4_0, and on the build that reads it the pruned model in Q4_0_64.

    Args:
        context: of the step.
        build: the option that names the build.
    """
    shapes = context.shapes
    asked = {"llama_cpp": getattr(context.options, build), "decode": (shapes.decode,)}
    options = BenchmarkOptions(engines=("llama.cpp",), device=context.options.device, **asked)
    for type, pruned in _KINDS if build == "llama_cpp" else _KINDS[:1]:
        file = _gguf(context, type, pruned)
        for graph in ("on", "off") if context.options.kind == "npu" else ("",):
            if graph:
                os.environ[_GRAPH] = "1" if graph == "on" else "0"
            engine = LlamaCppEngine.load(file, options, context.device)
            if engine.stand_in is not None:
                raise CameraError(f"{type}: {engine.stand_in}")
            timings = [engine.time_once(shapes.prompt, (shapes.decode,)) for _ in range(shapes.repeats)]
            told = engine.describe()
            engine.close()
            of = {"type": type, "pruned": "20 %" if pruned else "dense", "graph": graph}
            if (mode := told.get("execution_mode")) is not None:
                of["mode"] = mode
            milliseconds = [1000 * each.decode_s[shapes.decode] / shapes.decode for each in timings]
            context.measure("time of a token", statistics.median(milliseconds), "ms", **of)
            context.tell(**{f"{type}, graph {graph}": told})
        file.unlink()


def _gguf(context: Context, type: BlockType, pruned: bool) -> Path:
    """A GGUF file of random weights."""
    shapes, source, packed = context.shapes, context.scratch / "source", context.scratch / "packed"
    write_checkpoint(
        source, **shapes.sizes(shapes.layers, shapes.pruned_ffn if pruned else None), dtype=torch.bfloat16
    )
    options = QuantizeOptions(type=type, device=context.options.device)
    quantize_checkpoint(Checkpoint.open(source), packed, options)
    file = context.scratch / f"{type}.gguf"
    convert_to_gguf(packed, file, name=type)
    for folder in (source, packed):
        shutil.rmtree(folder)
    return file
