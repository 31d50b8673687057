"""Evaluation as a stage: perplexity of one model on one text."""

from dataclasses import asdict

from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import resolve_dtype
from camera.evaluation.perplexity import perplexity
from camera.files import write_json
from camera.options import PerplexityOptions
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register
from tasks.stages.fetch import TOKENS

RESULT = "perplexity.json"


class EvaluateTextOptions(PerplexityOptions):
    """How perplexity is measured on one text."""

    dataset: str
    """What the report calls the text."""


def run(context: Context) -> dict[str, float]:
    """Write `perplexity.json`."""
    asked = context.options.of(EvaluateTextOptions)
    tokens_N = read_tensors(context.inputs["text"] / TOKENS)["input_ids"][0]
    how = asked.model_dump(exclude={"dataset"})
    result = perplexity(context.inputs["model"], tokens_N, **how, progress=context.progress)
    write_json(context.out / RESULT, {"dataset": asked.dataset, **asdict(result)})
    return {"perplexity": result.perplexity, "tokens": result.tokens}


def needs(known: Known) -> Needs:
    """The whole model, as it is computed."""
    compute = resolve_dtype(known.recipe.evaluate.dtype, known.source.dtype)
    return Needs(memory=known.elements * compute.itemsize + 2 * known.largest)


STAGE = register(
    Stage("evaluate", 2, run, {"evaluate": EvaluateTextOptions}, needs, intermediate=False, part="evaluate")
)
