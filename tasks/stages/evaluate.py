"""Evaluation as a stage: perplexity of one model on one text."""

from dataclasses import asdict

from camera.checkpoints.safetensors_file import read_tensors
from camera.evaluation.perplexity import perplexity
from camera.files import write_json
from tasks.stage import Context, Stage
from tasks.stages.fetch import TOKENS

RESULT = "perplexity.json"


def run(context: Context) -> dict[str, float]:
    """Write `perplexity.json`."""
    options = dict(context.options)
    dataset = options.pop("dataset")
    tokens_N = read_tensors(context.inputs["text"] / TOKENS)["input_ids"][0]
    result = perplexity(context.inputs["model"], tokens_N, **options, progress=context.progress)
    write_json(context.out / RESULT, {"dataset": dataset, **asdict(result)})
    return {"perplexity": result.perplexity, "tokens": result.tokens}


STAGE = Stage("evaluate", version=1, run=run)
