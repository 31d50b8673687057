"""Dataset fetch: text becomes the tokens that later stages read."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.data import calibration_tokens, evaluation_tokens
from camera.files import write_json
from camera.options import CalibrationOptions, DatasetOptions
from tasks.stage import Context, Stage

TOKENS = "tokens.safetensors"


def run(context: Context) -> dict[str, float]:
    """Write `tokens.safetensors` with `input_ids`: int64 [samples, length] to calibrate, [1, tokens] to measure."""
    options = {
        name: value for name, value in context.options.items() if name not in ("purpose", "python", "window")
    }
    if "file" in context.inputs:
        options["path"] = context.inputs["file"]
    tokenizer = Checkpoint.open(context.inputs["tokenizer"]).load_tokenizer()
    if context.options["purpose"] == "calibration":
        tokens = calibration_tokens(CalibrationOptions(**options), tokenizer)
    else:
        window = {"window": context.options["window"]} if "window" in context.options else {}
        tokens = evaluation_tokens(DatasetOptions(**options), tokenizer, **window)[None]
    write_tensors(context.out / TOKENS, {"input_ids": tokens})
    described = {**context.options, "sequences": tokens.shape[0], "tokens": tokens.numel()}
    write_json(context.out / "dataset.json", described)
    return {"tokens": tokens.numel()}


STAGE = Stage("fetch", version=1, run=run)
