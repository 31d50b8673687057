"""Quality and speed: evaluate, bench. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.common import checked, dataset, print_json, progress_bar, say
from flows.commands.evaluating_tasks import on_tasks, tasks_json, tasks_table
from flows.commands.flags import (
    BatchSize,
    Device,
    DType,
    DTypeOption,
    Json,
)

if TYPE_CHECKING:
    from camera.options import EvaluateOptions


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint, a quantised folder or a GGUF.", show_default=False)
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="Measure perplexity on this: as --calibration of capture. Without --tasks: stdlib."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Measure accuracy on these tasks of lm-eval, with commas between them; nine: the nine "
            "of the Ascend version of CAMERA."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Also measure how far the model is from this one: KL divergence, and differences in "
            "accuracy on the same questions."
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer, for a GGUF.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window, at most the model's positions.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Read only so many windows.")] = None,
    few_shot: Annotated[int, typer.Option(help="Tasks: examples before each question.")] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Tasks: only the first so many questions of each.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Tasks: read <task>.<split>.jsonl files here, nothing from the hub.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Tasks: keep each result here. The same command goes on with those not done."),
    ] = None,
    batch_size: BatchSize = 4,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a held-out text, accuracy on tasks, and with --reference what was lost against a model.

    Examples: `camera evaluate MODEL --text wikitext2 --window 2048`

    `camera evaluate PRUNED --reference ORIGINAL --tasks nine --task-folder tasks --out results`
    """
    from rich.console import Console

    from camera.errors import CameraError
    from camera.evaluation.lm_eval_tasks import NINE_TASKS
    from camera.options import EvaluateOptions

    names = NINE_TASKS if tasks == "nine" else tuple(filter(None, (tasks or "").replace(" ", "").split(",")))
    options = checked(
        EvaluateOptions,
        window=window, max_windows=max_windows, batch_size=batch_size, dtype=dtype, device=device,
        tasks=names, few_shot=few_shot, limit=limit, task_folder=task_folder,
    )  # fmt: skip
    if out is not None and not names:
        raise CameraError("--out goes with --tasks: perplexity is measured in one go")
    folder = tokenizer or model
    if folder.is_file():
        raise CameraError(f"{model} is a GGUF file: name the folder with its tokenizer (--tokenizer FOLDER)")
    found: dict[str, Any] = {}
    if text is not None or not names:
        found |= _on_text(model, reference, folder, text or "stdlib", options)
    if names:
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
    if names:
        Console().print(tasks_table(scores, compared=reference is not None))


def _on_text(
    model: Path, reference: Path | None, tokenizer: Path, text: str, options: "EvaluateOptions"
) -> dict[str, Any]:
    """Perplexity, and the divergence from a reference, as plain values."""
    from dataclasses import asdict

    from camera.checkpoints.tokenizer import load_tokenizer
    from camera.data import evaluation_tokens
    from camera.evaluation.divergence import divergence
    from camera.evaluation.perplexity import perplexity
    from camera.loading import load_model
    from camera.options import DatasetOptions

    source = checked(DatasetOptions, **dataset(text), split="test")
    tokens_N = evaluation_tokens(source, load_tokenizer(tokenizer), options.window)
    how = options.model_dump(include={"window", "max_windows", "batch_size"})
    loaded = load_model(model, options.dtype, options.device)
    with progress_bar("evaluate") as progress:
        found = asdict(perplexity(loaded, tokens_N, **how, progress=progress))
    if reference is not None:
        other = load_model(reference, options.dtype, options.device)
        with progress_bar("compare") as progress:
            found["divergence"] = asdict(divergence(other, loaded, tokens_N, **how, progress=progress))
    return found


def bench(
    models: Annotated[list[Path], typer.Argument(help="Checkpoints or GGUF files.", show_default=False)],
    baseline: Annotated[Path | None, typer.Option(help="The model to compare with.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="torch or llama.cpp; may be repeated.")] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 4,
    decode: Annotated[list[int] | None, typer.Option(help="Tokens to decode; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs, alternating between the models.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    device: Device = "auto",
    llama_cpp: Annotated[Path | None, typer.Option(help="Folder with llama-bench.")] = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode, alternately with a baseline.

    Example: `camera bench pruned-q4_0_64.gguf --baseline unpruned-q4_0.gguf --decode 256 --decode 1024`
    """
    from camera.benchmark.bench import BenchModel, run_benchmark
    from camera.benchmark.table import markdown_table
    from camera.options import BenchmarkOptions

    options = checked(
        BenchmarkOptions,
        engines=tuple(engine) if engine else None,
        prompt=prompt,
        decode=tuple(decode) if decode else None,
        repeats=repeats,
        threads=threads,
        device=device,
        llama_cpp=llama_cpp,
    )
    chosen = [BenchModel(label=path.name, path=path, baseline=False) for path in models]
    if baseline is not None:
        chosen.insert(0, BenchModel(label=baseline.name, path=baseline, baseline=True))
    with progress_bar("bench") as progress:
        report = run_benchmark(chosen, options, progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        say(markdown_table(report))
