"""Evaluation as a stage: perplexity of one model on one text."""

from dataclasses import asdict

from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import resolve_device, resolve_dtype
from camera.evaluation.perplexity import perplexity
from camera.evaluation.text_model import SPARSE_COPIES, fits, hidden_room
from camera.files import write_json
from camera.options import PerplexityOptions, TaskOptions
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register
from tasks.stages.fetch import TOKENS

RESULT = "perplexity.json"
_HEAD_BYTES = 128 << 20
"""A slice of a large output head, and logits."""


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
    """As on so many tokens as the text's windows have."""
    asked = known.options.of(EvaluateTextOptions)
    return needs_on(known, asked, asked.max_windows and asked.max_windows * asked.window)


def needs_on(known: Known, asked: PerplexityOptions | TaskOptions, tokens: int | None) -> Needs:
    """A decoder layer of the model as it is computed, and the hidden states of so many tokens, None: of as many as go
    through it at once; or the whole model."""
    source, device = known.source, resolve_device(asked.device)
    dtype = resolve_dtype(asked.dtype, source.dtype)
    whole = asked.layer_by_layer is False or device.type != "cpu"
    if whole and (asked.layer_by_layer is not None or fits(source, device, dtype)):
        return Needs(memory=known.elements * dtype.itemsize + 2 * known.largest)
    layers = round(2 * known.layer * (1 + dtype.itemsize / source.dtype.itemsize))
    head = min(_HEAD_BYTES, known.largest * dtype.itemsize // source.dtype.itemsize)
    states = hidden_room([device])
    if tokens is not None:
        copies = SPARSE_COPIES if source.expert_count else 1
        states = min(states, copies * tokens * source.hidden_size * dtype.itemsize)
    return Needs(memory=layers + head + states)


STAGE = register(
    Stage("evaluate", 4, run, {"evaluate": EvaluateTextOptions}, needs, intermediate=False, part="evaluate")
)
