"""Text that a model writes, as a stage: for people to read in the report."""

from typing import Annotated

from camera.devices import resolve_dtype
from camera.evaluation.samples import write_samples
from camera.files import write_json
from camera.options import Options, Setting
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register

RESULT = "samples.json"


class SampleOptions(Options):
    """How text is written."""

    tokens: int
    """The most after each prompt."""
    dtype: str = "auto"
    """What the layers compute in; `auto` is the checkpoint's own."""
    device: Annotated[str, Setting] = "auto"
    """As in capture."""


def run(context: Context) -> dict[str, float]:
    """Write `samples.json`."""
    asked = context.options.of(SampleOptions)
    samples = write_samples(context.inputs["model"], asked.tokens, asked.dtype, asked.device)
    write_json(context.out / RESULT, [sample.model_dump() for sample in samples])
    return {}


def needs(known: Known) -> Needs:
    """The whole model, as it is computed."""
    asked = known.options.of(SampleOptions)
    dtype = resolve_dtype(asked.dtype, known.source.dtype)
    return Needs(memory=known.elements * dtype.itemsize + 2 * known.largest)


STAGE = register(Stage("sample", 1, run, {"sample": SampleOptions}, needs, intermediate=False, part="sample"))
