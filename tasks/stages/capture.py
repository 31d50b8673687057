"""Activation capture as a stage."""

from typing import Annotated, Literal

from pydantic import Field

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import resolve_dtype
from camera.layerwise.feed_forward import ACTIVATION_BUDGET_BYTES
from camera.options import CaptureOptions, PositiveInt, PruneOptions, Setting, UsedWhen
from camera.pruning.estimate import estimate_capture
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture
from tasks.estimate import PROCESS_BYTES, Known, Needs
from tasks.stage import Context, Stage, register
from tasks.stages.fetch import TOKENS

_FOR_A_SPLIT = UsedWhen(lambda options: options.experts == "auto")
"""Else the widths that stay say all."""


class DecideOptions(PruneOptions):
    """What a capture that decides depends on: the widths that stay, which several ratios come to, and the method."""

    kept: int
    others_kept: tuple[int, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Of the other widths that change: that of the network which experts share."""
    ratio: Annotated[float, _FOR_A_SPLIT] = 0.2
    multiple_of: Annotated[PositiveInt, _FOR_A_SPLIT] = 64
    mode: Annotated[Literal["physical", "mask"], Setting] = "physical"


def run(context: Context) -> dict[str, float]:
    tokens_ST = read_tensors(context.inputs["calibration"] / TOKENS)["input_ids"]
    checkpoint = Checkpoint.open(context.inputs["model"])
    options, plan = context.options.of(CaptureOptions), None
    if "decide" in context.options:
        plan = plan_prune(checkpoint, options, context.options.of(DecideOptions))
    capture(checkpoint, tokens_ST, context.out, options, plan, context.progress)
    return {"tokens": tokens_ST.numel()}


def needs(known: Known) -> Needs:
    """Two layers, as stored and as computed; hidden states, from which a killed capture goes on, and activations."""
    source, capturing = known.source, known.options.of(CaptureOptions)
    compute = resolve_dtype(capturing.dtype, source.dtype).itemsize
    hidden = known.pruning.streams * known.tokens * source.hidden_size * compute
    activations = min(ACTIVATION_BUDGET_BYTES, known.tokens * source.ffn_width * compute)
    layers = round(2 * known.layer * (1 + compute / source.dtype.itemsize))
    statistics = 12 * known.channels
    return Needs(disk=hidden + statistics + known.new_matrices, memory=layers + hidden + activations)


def trial(known: Known) -> Needs:
    """As `needs`, with memory and seconds of a trial."""
    tokens = known.recipe.calibration
    found = estimate_capture(
        known.source, tokens.samples, tokens.length, known.options.of(CaptureOptions), known.pruning
    )
    # Tried in this process, and run in one that holds more.
    memory = found.peak_bytes - (found.process_bytes or PROCESS_BYTES)
    return Needs(disk=needs(known).disk, memory=memory, seconds=found.seconds)


STAGE = register(
    Stage(
        "capture",
        6,
        run,
        {"capture": CaptureOptions, "decide": DecideOptions},
        needs,
        intermediate=True,
        part="capture",
        trial=trial,
        resumes=True,
    )
)
