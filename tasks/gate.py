"""The quality gate: results held to what the recipe requires before anything is published."""

from collections.abc import Collection, Iterator

from camera.errors import CameraError
from camera.report.gate import Gate, Requirement
from camera.report.schema import Results
from tasks.recipe import EVERY_TEXT, RequireOptions


def judge(results: Results, require: RequireOptions) -> Gate:
    """Hold the product of a run (the quantised model, else the pruned one) to the requirements."""
    found = [*_perplexities(results, require)]
    if require.task_drop is not None:
        change = None if results.product is None else results.product.task_change
        drop = None if change is None else -100 * change.difference
        found.append(Requirement(name="task_drop", of="the tasks", limit=require.task_drop, found=drop))
    return Gate(requirements=tuple(found))


def _perplexities(results: Results, require: RequireOptions) -> Iterator[Requirement]:
    measured = {} if results.product is None else results.product.perplexity
    limits = dict(require.perplexity_increase)
    every = limits.pop(EVERY_TEXT, None)
    if every is not None:
        limits = dict.fromkeys(results.datasets, every) | limits
    for text, limit in limits.items():
        found = measured[text].change if text in measured else None
        yield Requirement(name="perplexity_increase", of=text, limit=limit, found=found)


def check_requirements(require: RequireOptions, texts: Collection[str], tasks: Collection[str]) -> None:
    """Refuse requirements that no evaluation of the recipe could meet.

    Raises:
        CameraError: naming the text that is not evaluated, or saying which tasks to add.
    """
    for text in require.perplexity_increase:
        if text not in texts and text != EVERY_TEXT:
            raise CameraError(
                f"publish.require.perplexity_increase.{text}: no text of evaluate.datasets is called so; "
                f"there are: {', '.join(texts)}"
            )
    if require.task_drop is not None and not tasks:
        raise CameraError("publish.require.task_drop: no tasks are measured; name some in evaluate.tasks")
