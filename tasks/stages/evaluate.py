"""Evaluation as a stage: perplexity of one model on one text."""

from dataclasses import asdict

import torch

from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import free_memory_bytes, resolve_device, resolve_dtype
from camera.evaluation.perplexity import perplexity
from camera.evaluation.text_model import HIDDEN_SHARE, WHOLE_SHARE
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
    """The whole model, as it is computed; or a decoder layer of it and the hidden states of the text."""
    asked, source = known.options.of(EvaluateTextOptions), known.source
    compute = resolve_dtype(asked.dtype, source.dtype).itemsize
    free = free_memory_bytes(resolve_device(asked.device))
    too_large = known.elements * compute > WHOLE_SHARE * free
    if too_large if asked.layer_by_layer is None else asked.layer_by_layer:
        layers = round(2 * known.layer * (1 + compute / source.dtype.itemsize))
        head = known.largest * compute // source.dtype.itemsize
        states = round(HIDDEN_SHARE * free_memory_bytes(torch.device("cpu")))
        if asked.max_windows is not None:
            copies = 3 if source.expert_count else 1
            states = min(states, copies * asked.max_windows * asked.window * source.hidden_size * compute)
        return Needs(memory=layers + head + states)
    return Needs(memory=known.elements * compute + 2 * known.largest)


STAGE = register(
    Stage("evaluate", 2, run, {"evaluate": EvaluateTextOptions}, needs, intermediate=False, part="evaluate")
)
