"""Decoding at real shapes, random weights, step by step and as a recorded graph."""

import statistics
from time import perf_counter

import torch

from camera.device_check.context import Context
from camera.device_check.random_source import random_source
from camera.device_check.schema import Measurement
from camera.devices import free_memory_bytes
from camera.engines.parts.launches import launches_of
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError
from camera.models.shapes import PanguSizes
from camera.options import BlockType
from camera.units import bytes_text


def run(context: Context, type: BlockType | None, pruned: bool) -> None:
    """Load and decode.

    Args:
        context: of the step.
        type: of the blocks; None: 16 bits.
        pruned: whether the feed-forward networks have a fifth fewer channels.
    """
    shapes = context.shapes
    began = perf_counter()
    engine = loaded(context, type, pruned)
    context.measure("loading", perf_counter() - began, "s")
    footprint = engine.footprint()
    mean_context = shapes.prompt + (shapes.decode + 1) / 2
    moved = footprint.weight_bytes_per_token + footprint.kv_bytes_per_position * mean_context
    context.measure("bytes of a token", moved, "B")
    context.measure("layers", shapes.layers)
    ways = ["eager"]
    if (step := engine.step) is not None:
        if step.describe()["graph"]:
            ways.append("captured")
        else:
            context.add(
                Measurement(
                    what="time of a token",
                    of={"way": "captured"},
                    error=f"no graph was recorded: {step.describe()['failed']}",
                )
            )
    for way in ways:
        if step is not None:
            step.replays = way == "captured"
        if way == "eager":
            engine.prefill([1, 2, 3])
            context.measure("launches of a token", launches_of(lambda: engine.decode(1)).total())
        timings = [engine.time_once(shapes.prompt, (shapes.decode,)) for _ in range(shapes.repeats + 1)]
        # The first loads kernels.
        samples = [1000 * timing.decode_s[shapes.decode] / shapes.decode for timing in timings[1:]]
        context.measure("time of a token", statistics.median(samples), "ms", way=way)
        context.measure("spread of the time", max(samples) - min(samples), "ms", way=way)
    if (peak := engine.footprint().peak_bytes) is not None:
        context.measure("peak memory", peak, "B")
    context.tell(engine=engine.describe())


def loaded(context: Context, type: BlockType | None, pruned: bool) -> TorchEngine:
    """The engine, ready to decode.

    Raises:
        CameraError: if the device has no room for the model.
    """
    shapes = context.shapes
    source = random_source(
        PanguSizes(**shapes.sizes(shapes.layers, shapes.pruned_ffn if pruned else None)), type
    )
    weights = shapes.weights(shapes.layers, pruned=pruned)
    need = int(weights * (2 if type is None else 0.6))
    if (free := free_memory_bytes(context.device)) < need:
        raise CameraError(
            f"{context.device} has {bytes_text(free)} free, and the model needs about {bytes_text(need)}"
        )
    with torch.inference_mode():
        return TorchEngine(source, context.device, shapes.prompt + shapes.decode)
