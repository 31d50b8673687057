"""Quantisation as a stage."""

from math import prod

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import resolve_dtype
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.plan import plan_types
from camera.registry import BLOCK_FORMATS, QUANTIZATION_METHODS
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register
from tasks.stages.fetch import TOKENS

_MOMENT_SQUARES = 1.25
"""Of float64: GPTQ factors the moments of one input where they lie, and rounds some rows at once."""

_ROWS_BYTES = 400 << 20
"""What 16 threads, which is the most, hold of rows in several forms while they pack."""


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    tokens_ST = None
    if "calibration" in context.inputs:  # of a method that calibrates
        tokens_ST = read_tensors(context.inputs["calibration"] / TOKENS)["input_ids"]
    options = context.options.of(QuantizeOptions)
    report = quantize_checkpoint(checkpoint, context.out, options, tokens_ST, progress=context.progress)
    return {
        "bits_per_weight": report.bits_per_weight,
        "bytes": report.bytes,
        "relative_error": report.relative_error,
    }


def needs(known: Known) -> Needs:
    """The packed weights, and some rows of a tensor for each thread. A method that calibrates also holds hidden states and a decoder
    layer (with experts, two more of each hidden state), and `gptq` the float64 square of the widest input's moments."""
    asked, source = known.options.of(QuantizeOptions), known.source
    elements = known.size("model") // source.dtype.itemsize
    memory = min(4 * known.largest, _ROWS_BYTES)
    if asked.calibrates:
        compute = resolve_dtype(asked.dtype, source.dtype)
        layer = known.layer // source.dtype.itemsize
        states = 3 if source.experts else 1
        memory += (states * known.tokens * source.hidden_size + layer) * compute.itemsize
    if QUANTIZATION_METHODS[asked.method].inverts_moments:
        memory += 4 * known.largest
        memory += round(_MOMENT_SQUARES * 8 * max(known.pruning.kept, source.hidden_size) ** 2)
    bits = asked.target_bpw or BLOCK_FORMATS[asked.type].bits_per_weight
    return Needs(disk=round(elements * bits / 8) + _beyond(asked, source), memory=memory)


def _beyond(asked: QuantizeOptions, source: Checkpoint) -> int:
    """Bytes of the output head beyond those of `type`, where it is of a finer one."""
    if asked.target_bpw is not None:
        return 0
    head = next(planned for planned in plan_types(source, asked) if planned.name == source.head)
    bits = BLOCK_FORMATS[head.type].bits_per_weight - BLOCK_FORMATS[asked.type].bits_per_weight
    return max(0, round(prod(head.shape) * bits / 8))


STAGE = register(
    Stage(
        "quantize",
        6,
        run,
        {"quantize": QuantizeOptions},
        needs,
        intermediate=True,
        part="quantized",
        resumes=True,
    )
)
