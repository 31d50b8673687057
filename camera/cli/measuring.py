"""Quality and speed: evaluate, bench. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from camera.cli.options import Flags
from camera.cli.output import print_json, progress_bar, say
from camera.cli.parameters import Json
from camera.cli.task_scores import on_tasks, tasks_json, tasks_table

if TYPE_CHECKING:
    from camera.options import BenchmarkOptions, DatasetOptions, EvaluateOptions


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint, a quantised folder or a GGUF.", show_default=False)
    ],
    options: "EvaluateOptions",
    text: Annotated["DatasetOptions | None", Flags(split="test")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Also measure how far the model is from this one: KL divergence, and differences in "
            "accuracy on the same questions."
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer, for a GGUF.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Tasks: keep each result here. The same command goes on with those not done."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a held-out text, accuracy on tasks, and with --reference what was lost against a model.

    Without --text and --tasks the text is stdlib's. --tasks nine: those of the Ascend version of CAMERA.

    Examples: `camera evaluate MODEL --text wikitext2 --window 2048`

    `camera evaluate PRUNED --reference ORIGINAL --tasks nine --task-folder tasks --out results`
    """
    from dataclasses import asdict

    from rich.console import Console

    from camera import api
    from camera.errors import CameraError
    from camera.evaluation.lm_eval_tasks import NINE_TASKS

    if options.tasks == ("nine",):
        options = options.model_copy(update={"tasks": NINE_TASKS})
    if out is not None and not options.tasks:
        raise CameraError("--out goes with --tasks: perplexity is measured in one go")
    folder = api.tokenizer_folder(model, tokenizer)
    found: dict[str, Any] = {}
    if text is not None or not options.tasks:
        with progress_bar("evaluate") as progress:
            measured = api.evaluate(model, text, options, reference, folder, progress)
        found = asdict(measured.perplexity)
        if measured.divergence is not None:
            found["divergence"] = asdict(measured.divergence)
    if options.tasks:
        scores, originals = on_tasks(model, reference, folder, out, options)
        found |= tasks_json(scores, originals)
    if as_json:
        print_json(found)
        return
    if "perplexity" in found:
        say(
            f"perplexity {found['perplexity']:.4f} over {found['tokens']} tokens "
            f"({found['windows']} windows of {found['window']}, {found['dtype']} on {found['device']})"
        )
    if compared := found.get("divergence"):
        say(
            f"KL divergence {compared['divergence']:.5f} nats per token from {reference}, "
            f"the same likeliest token {compared['top_1_agreement']:.2%} of the time"
        )
    if options.tasks:
        Console().print(tasks_table(scores, compared=reference is not None))


def bench(
    models: Annotated[list[Path], typer.Argument(help="Checkpoints or GGUF files.", show_default=False)],
    options: "BenchmarkOptions",
    baseline: Annotated[Path | None, typer.Option(help="The model to compare with.")] = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode, alternately with a baseline.

    Example: `camera bench pruned-q4_0_64.gguf --baseline unpruned-q4_0.gguf --decode 256 --decode 1024`
    """
    from camera import api
    from camera.benchmark.table import markdown_table

    with progress_bar("bench") as progress:
        report = api.bench(models, options, baseline, progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        say(markdown_table(report))
