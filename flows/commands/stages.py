"""One stage each, for people with scripts of their own: paths in, paths out; no orchestrator, no store."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import checked, dataset, print_json, progress_bar, say


class Mode(StrEnum):
    physical = "physical"
    mask = "mask"


class Propagate(StrEnum):
    sequential = "sequential"
    one_shot = "one-shot"


class Block(StrEnum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    q4_0_64 = "q4_0_64"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)]


def _free(out: Path) -> Path:
    """Refuse an occupied output before any work is done for it."""
    from camera.files import refuse_occupied

    refuse_occupied(out)
    return out


Out = Annotated[
    Path,
    typer.Argument(help="Folder to write; must not exist with content.", show_default=False, callback=_free),
]
Calibration = Annotated[
    str,
    typer.Option(
        help="A .txt, .jsonl or .parquet file or folder, a .safetensors file with `input_ids` int64 "
        "[samples, length], or one of stdlib, wikitext2, c4.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(help="Windows of calibration tokens.")]
Length = Annotated[int, typer.Option(help="Tokens in a window.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of windows.")]
Ratio = Annotated[float, typer.Option(help="Share of the FFN channels to remove.")]
ReduceRatio = Annotated[float, typer.Option(help="CAMERA's alpha: weight of the largest activation.")]
MultipleOf = Annotated[int, typer.Option(help="Round the kept width up to a multiple of this.")]
PropagateOption = Annotated[
    Propagate, typer.Option(help="sequential: each layer sees the pruned layers below it.")
]
BatchSize = Annotated[int, typer.Option(help="Samples computed at once.")]
DTypeOption = Annotated[
    DType, typer.Option("--dtype", help="What layers compute in; auto: the checkpoint's own.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda[:N] or npu[:N].")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def capture(
    model: Model,
    out: Out,
    calibration: Calibration,
    propagate: PropagateOption = Propagate.one_shot,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    ratio: Ratio = 0.2,
    reduce_ratio: ReduceRatio = 0.95,
    multiple_of: MultipleOf = 64,
    batch_size: BatchSize = 8,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
) -> None:
    """Measure the activations of every FFN channel.

    One-shot statistics serve every ratio. In sequential mode they hold for one --ratio, --reduce-ratio and
    --multiple-of.

    Example: `camera capture MODEL stats --calibration text.txt --samples 64 --length 512`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_tokens
    from camera.files import whole_folder
    from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
    from camera.pruning.capture import capture as run
    from camera.pruning.capture import selection_of

    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    options = checked(CaptureOptions, propagate=propagate, batch_size=batch_size, dtype=dtype, device=device)
    prune_options = checked(PruneOptions, ratio=ratio, reduce_ratio=reduce_ratio, multiple_of=multiple_of)
    selection = selection_of(checkpoint, options, prune_options)
    text = checked(CalibrationOptions, **dataset(calibration), samples=samples, length=length, seed=seed)
    tokens_ST = calibration_tokens(text, checkpoint.load_tokenizer())
    with whole_folder(out) as folder, progress_bar("capture") as progress:
        run(checkpoint, tokens_ST, folder, options, selection, progress)
    say(f"statistics of {tokens_ST.numel()} tokens: {out}")


def score(
    model: Model,
    captured: Annotated[Path, typer.Argument(help="Folder that `camera capture` wrote.", show_default=False)],
    out: Out,
    reduce_ratio: ReduceRatio = 0.95,
) -> None:
    """Turn statistics into one importance per FFN channel.

    Example: `camera score MODEL stats scores --reduce-ratio 0.95`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.files import whole_folder
    from camera.options import PruneOptions
    from camera.pruning.score import score as run

    alpha = checked(PruneOptions, reduce_ratio=reduce_ratio).reduce_ratio
    with whole_folder(out) as folder, progress_bar("score") as progress:
        run(Checkpoint.open(model), captured, folder, alpha, progress)
    say(f"scores: {out}")


def prune(
    model: Model,
    out: Out,
    calibration: Annotated[
        str | None, typer.Option(help="As for capture; goes from capture to save.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Instead: a folder of `camera score`; writes what `camera save` reads."),
    ] = None,
    ratio: Ratio = 0.2,
    reduce_ratio: ReduceRatio = 0.95,
    mode: Annotated[
        Mode, typer.Option(help="physical slices the matrices, mask writes zeros.")
    ] = Mode.physical,
    propagate: PropagateOption = Propagate.sequential,
    multiple_of: MultipleOf = 64,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
) -> None:
    """Remove the least important FFN channels: capture, score, prune and save in one go.

    OUT is a standard Hugging Face folder. With --scores only the prune stage runs.

    Example: `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.2 --reduce-ratio 0.95`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.errors import CameraError
    from camera.files import whole_folder
    from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
    from camera.pruning.prune import prune as run
    from flows.commands.prune import capture_to_save

    if (calibration is None) == (scores is None):
        raise CameraError(
            "give either --calibration (to go from capture to save) or --scores (to prune alone)"
        )
    options = checked(
        PruneOptions, ratio=ratio, reduce_ratio=reduce_ratio, mode=mode, multiple_of=multiple_of
    )
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    if scores is not None:
        with whole_folder(out) as folder, progress_bar("prune") as progress:
            run(checkpoint, scores, folder, options, progress)
        say(f"pruned matrices: {out}")
        return
    assert calibration is not None
    capture_to_save(
        checkpoint,
        out,
        checked(CalibrationOptions, **dataset(calibration), samples=samples, length=length, seed=seed),
        checked(CaptureOptions, propagate=propagate, batch_size=batch_size, dtype=dtype, device=device),
        options,
    )


def save(
    model: Model,
    pruned: Annotated[Path, typer.Argument(help="Folder of `camera prune --scores`.", show_default=False)],
    out: Out,
) -> None:
    """Write the pruned model as a standard Hugging Face folder, and compare what was written.

    Example: `camera save MODEL pruned out`
    """
    from camera.report.card import write_card

    from camera.checkpoints.checkpoint import Checkpoint
    from camera.files import whole_folder
    from camera.pruning.save import save as run

    checkpoint = Checkpoint.open(model)
    with whole_folder(out) as folder, progress_bar("save") as progress:
        run(checkpoint, pruned, folder, progress)
        write_card(folder, checkpoint, pruned, base_model=model.name)
    say(f"model: {out}")


def quantize(
    model: Model,
    out: Out,
    type: Annotated[
        Block, typer.Option(help="q4_0_64 for the Ascend 910B, q4_0 for stock llama.cpp.")
    ] = Block.q4_0_64,
    output_type: Annotated[Block | None, typer.Option(help="Type of the output head.")] = None,
    embedding_type: Annotated[Block | None, typer.Option(help="Type of the token embedding.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=TYPE on Hugging Face names; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model's matrices into blocks.

    Example: `camera quantize MODEL packed --type q4_0_64 --override '*.down_proj.weight=q8_0'`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.errors import CameraError
    from camera.files import whole_folder
    from camera.formats.quantize import quantize_checkpoint
    from camera.options import QuantizeOptions

    overrides = {}
    for entry in override or ():
        pattern, found, name = entry.rpartition("=")
        if not found:
            raise CameraError(
                f"--override {entry}: write PATTERN=TYPE, for example '*.down_proj.weight=q8_0'"
            )
        overrides[pattern] = name
    options = checked(
        QuantizeOptions,
        type=type,
        output_type=output_type,
        embedding_type=embedding_type,
        overrides=overrides,
    )
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    with whole_folder(out) as folder, progress_bar("quantize") as progress:
        report = quantize_checkpoint(checkpoint, folder, options, progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    say(f"{report.bits_per_weight:.3f} bits per weight: {out}")
    for tensor in report.tensors:
        if tensor.fallback:
            say(f"  {tensor.name}: {tensor.type}, because {tensor.fallback}")


def convert(
    quantized: Annotated[Path, typer.Argument(help="Folder of `camera quantize`.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="general.name; the default is the file's name.")] = None,
    twin: Annotated[
        str | None, typer.Option(help="q4_0: also write the lossless Q4_0 twin of a Q4_0_64 file.")
    ] = None,
) -> None:
    """Write a GGUF file with tokenizer, chat template and metadata.

    Example: `camera convert packed model-q4_0_64.gguf --twin q4_0`
    """
    from camera.errors import CameraError
    from camera.files import refuse_occupied
    from camera.formats.convert import convert_to_gguf, write_twin

    if twin not in (None, "q4_0"):
        raise CameraError(f"--twin {twin}: the only twin is q4_0")
    twin_path = out.with_name(f"{out.stem}-q4_0-twin.gguf")
    for path in (out, twin_path) if twin else (out,):
        refuse_occupied(path)
    with progress_bar("convert") as progress:
        convert_to_gguf(quantized, out, name=name or out.stem, lineage=None, progress=progress)
    say(f"gguf: {out}")
    if twin:
        write_twin(out, twin_path)
        say(f"twin: {twin_path}")


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint, a quantised folder or a GGUF.", show_default=False)
    ],
    text: Annotated[str, typer.Option(help="As --calibration of capture.")] = "stdlib",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer, for a GGUF.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window, at most the model's positions.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Read only so many windows.")] = None,
    batch_size: BatchSize = 4,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a held-out text.

    Example: `camera evaluate MODEL --text wikitext2_test.txt --window 2048`
    """
    from dataclasses import asdict

    from camera.checkpoints.tokenizer import load_tokenizer
    from camera.data import evaluation_tokens
    from camera.errors import CameraError
    from camera.evaluation.perplexity import perplexity
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
    with progress_bar("evaluate") as progress:
        result = perplexity(
            model,
            tokens_N,
            window=options.window,
            max_windows=options.max_windows,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(asdict(result))
    else:
        say(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens "
            f"({result.windows} windows of {result.window}, {result.dtype} on {result.device})"
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
