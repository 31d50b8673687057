"""Quality and speed: evaluate, bench. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import checked, dataset, print_json, progress_bar, say
from flows.commands.flags import (
    BatchSize,
    Device,
    DType,
    DTypeOption,
    Json,
)


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint, a quantised folder or a GGUF.", show_default=False)
    ],
    text: Annotated[str, typer.Option(help="As --calibration of capture.")] = "stdlib",
    reference: Annotated[
        Path | None, typer.Option(help="Also measure how far the model is from this one: KL divergence.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer, for a GGUF.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window, at most the model's positions.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Read only so many windows.")] = None,
    batch_size: BatchSize = 4,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a held-out text, and with --reference the divergence from the model it was made of.

    Example: `camera evaluate MODEL --text wikitext2_test.txt --window 2048`
    """
    from dataclasses import asdict

    from camera.checkpoints.tokenizer import load_tokenizer
    from camera.data import evaluation_tokens
    from camera.errors import CameraError
    from camera.evaluation.divergence import divergence
    from camera.evaluation.perplexity import perplexity
    from camera.loading import load_model
    from camera.options import DatasetOptions, EvaluateOptions

    options = checked(
        EvaluateOptions, window=window, max_windows=max_windows, batch_size=batch_size, dtype=dtype
    )
    folder = tokenizer or model
    if folder.is_file():
        raise CameraError(f"{model} is a GGUF file: name the folder with its tokenizer (--tokenizer FOLDER)")
    tokens_N = evaluation_tokens(
        checked(DatasetOptions, **dataset(text), split="test"), load_tokenizer(folder)
    )
    how = options.model_dump(include={"window", "max_windows", "batch_size"})
    loaded = load_model(model, options.dtype, device)
    with progress_bar("evaluate") as progress:
        result = perplexity(loaded, tokens_N, **how, progress=progress)
    compared = None
    if reference is not None:
        with progress_bar("compare") as progress:
            compared = divergence(
                load_model(reference, options.dtype, device), loaded, tokens_N, **how, progress=progress
            )
    if as_json:
        print_json(asdict(result) | ({} if compared is None else {"divergence": asdict(compared)}))
        return
    say(
        f"perplexity {result.perplexity:.4f} over {result.tokens} tokens "
        f"({result.windows} windows of {result.window}, {result.dtype} on {result.device})"
    )
    if compared is not None:
        say(
            f"KL divergence {compared.divergence:.5f} nats per token from {reference}, "
            f"the same likeliest token {compared.top_1_agreement:.2%} of the time"
        )


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
