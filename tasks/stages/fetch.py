"""Dataset fetch: text becomes the tokens that later stages read."""

import platform

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.data import calibration_tokens, evaluation_tokens
from camera.files import write_json
from camera.options import CalibrationOptions, DatasetOptions
from tasks.estimate import Needs
from tasks.stage import Context, Stage, register

TOKENS = "tokens.safetensors"


class TextOptions(DatasetOptions):
    """A text to measure on."""

    window: int | None = None
    """Tokens per window, where random windows stand for the text."""


def run(context: Context) -> dict[str, float]:
    """Write `tokens.safetensors` with `input_ids`: int64 [samples, length] to calibrate, [1, tokens] to measure."""
    ((purpose, asked),) = context.options.items()
    here = {"path": context.inputs["file"]} if "file" in context.inputs else {}
    tokenizer = Checkpoint.open(context.inputs["tokenizer"]).load_tokenizer()
    if isinstance(asked, CalibrationOptions):
        tokens = calibration_tokens(asked.model_copy(update=here), tokenizer)
    else:
        text = context.options.of(TextOptions).model_copy(update=here)
        tokens = evaluation_tokens(text, tokenizer, **({"window": text.window} if text.window else {}))[None]
    write_tensors(context.out / TOKENS, {"input_ids": tokens})
    described = {**asked.identity(), "purpose": purpose, "python": platform.python_version()}
    described |= {"sequences": tokens.shape[0], "tokens": tokens.numel()}
    write_json(context.out / "dataset.json", described)
    return {"tokens": tokens.numel()}


STAGE = register(
    Stage(
        "fetch",
        3,
        run,
        {"calibration": CalibrationOptions, "evaluation": TextOptions},
        lambda known: Needs(disk=8 * known.tokens),
        intermediate=True,
    )
)
