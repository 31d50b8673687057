"""The stages as functions of paths and options: what `import camera` offers, and what the commands do.

The commands are made from these functions: an argument for each parameter without a default, a flag for each other one
and for each field of options, and the docstring as their help. So nothing heavy is imported before a function is called.
docs/library.md shows each at work. What the user can mend is a CameraError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from camera.device_check.plan import Tell
from camera.errors import CameraError
from camera.progress import Progress, silent

if TYPE_CHECKING:
    from camera.benchmark.report import BenchmarkReport
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.device_check.schema import CheckReport
    from camera.evaluation.divergence import DivergenceResult
    from camera.evaluation.perplexity import PerplexityResult
    from camera.evaluation.samples import Sample
    from camera.formats.gguf_import import ImportReport
    from camera.formats.quantized_model import QuantizeReport
    from camera.options import (
        BenchmarkOptions,
        CalibrationOptions,
        CaptureOptions,
        CheckOptions,
        DatasetOptions,
        EvaluateOptions,
        PruneOptions,
        QuantizeOptions,
    )
    from camera.report.schema import TaskScore

Place = Path | str


def open_checkpoint(folder: Place) -> "Checkpoint":
    """Open a Hugging Face checkpoint: its config, its family, and its tensors, which are read one at a time.

    Raises:
        CameraError: if it is none, damaged, of a family that is not supported, or its shapes contradict its config.
    """
    from camera.checkpoints.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(Path(folder))
    checkpoint.check_shapes()
    return checkpoint


def import_gguf(
    file: Place,
    out: Place,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    progress: Progress = silent,
) -> "ImportReport":
    """Make a standard Hugging Face folder of a GGUF file, for all other commands and for transformers.

    Config, weights, tokenizer, chat template and generation config; tensors of any type become the numbers that the file
    stands for. Splits of text and special tokens are those of llama.cpp.

    Examples: `camera import SmolLM2-135M-Instruct.Q4_1.gguf smollm2`

    `camera import model-q8_0.gguf model --dtype bfloat16`

    Args:
        file: the .gguf file.
        out: folder to make.
        dtype: of the weights; auto is the narrowest of the file's float types that holds all its numbers, and float32 where
            tensors are quantised.
        progress: told of tensors.

    Returns:
        What the folder holds of the file, and what the file cannot say; `import.json` has the same.
    """
    from camera.files import atomic_folder
    from camera.formats.gguf_import import import_file

    with atomic_folder(Path(out)) as folder:
        return import_file(Path(file), folder, dtype, progress)


def capture(
    model: Place,
    out: Place,
    calibration: "CalibrationOptions",
    options: "CaptureOptions | None" = None,
    prune: "PruneOptions | None" = None,
    progress: Progress = silent,
) -> int:
    """Measure the activations of every FFN channel.

    One-shot statistics serve every ratio. In sequential mode they hold for one --ratio, --reduce-ratio and
    --multiple-of.

    Example: `camera capture MODEL stats --calibration text.txt --samples 64 --length 512`

    Args:
        model: folder of a Hugging Face checkpoint.
        out: folder to make.
        calibration: the text.
        options: how; the default is one-shot.
        prune: in sequential mode, which channels go in the layers below.
        progress: told (samples done × layers, all).

    Returns:
        The number of tokens measured on.
    """
    from camera.data import calibration_windows
    from camera.devices import devices_of
    from camera.files import atomic_folder, refuse_occupied
    from camera.held import holding, note
    from camera.options import CaptureOptions, PruneOptions
    from camera.pruning.plan import plan_prune
    from camera.pruning.stages import capture as run

    refuse_occupied(Path(out))
    checkpoint = open_checkpoint(model)
    options = options or CaptureOptions(propagate="one-shot")
    sequential = options.propagate == "sequential"
    if prune is not None and (prune.method != "camera" or prune.sparsity):
        raise CameraError(
            f"method {prune.method} with sparsity {prune.sparsity:g} goes from capture to save at once: use prune"
        )
    devices_of(options.device, options.devices)
    plan = plan_prune(checkpoint, options, prune or PruneOptions()) if sequential else None
    tokens_ST = calibration_windows(calibration, checkpoint)
    with atomic_folder(Path(out)) as folder, holding(note(checkpoint.folder, checkpoint.files)):
        run(checkpoint, tokens_ST, folder, options, plan, progress)
    return tokens_ST.numel()


def score(
    model: Place, captured: Place, out: Place, reduce_ratio: float = 0.95, progress: Progress = silent
) -> None:
    """Turn statistics into one importance per FFN channel.

    Example: `camera score MODEL stats scores --reduce-ratio 0.95`

    Args:
        model: folder of the checkpoint.
        captured: folder of `capture`.
        out: folder to make.
        reduce_ratio: CAMERA's alpha: weight of the largest activation against the sum of squares.
        progress: told (layers done, all).
    """
    from camera.files import atomic_folder
    from camera.options import PruneOptions
    from camera.pruning.stages import score as run

    alpha = PruneOptions(reduce_ratio=reduce_ratio).reduce_ratio
    with atomic_folder(Path(out)) as folder:
        run(open_checkpoint(model), Path(captured), folder, alpha, progress)


def prune(
    model: Place,
    out: Place,
    options: "PruneOptions | None" = None,
    capture: "CaptureOptions | None" = None,
    calibration: "CalibrationOptions | None" = None,
    scores: Place | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Remove the least important FFN channels: capture, score, prune and save in one go.

    OUT is a standard Hugging Face folder. A killed run goes on at the layer it was in. With --scores only the prune
    stage runs. --method refit loses less, and takes several times as long: layers run for the source model too.

    Examples: `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.2 --reduce-ratio 0.95`

    `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.4 --method refit`

    Args:
        model: folder of a Hugging Face checkpoint.
        out: folder to make.
        options: which channels go.
        capture: how activations are measured.
        calibration: the text.
        scores: instead of a calibration text, a folder of `score`; `save` reads what is written.
        progress: told (samples done × layers, all).

    Returns:
        What was done, as `prune.json` has it: the kept width, and how each layer was decided.
    """
    from camera.data import calibration_windows
    from camera.devices import devices_of
    from camera.files import atomic_folder, read_json, refuse_occupied
    from camera.locks import LockedError
    from camera.options import CaptureOptions, PruneOptions
    from camera.pruning.plan import plan_prune
    from camera.pruning.prune_checkpoint import prune_checkpoint, unfinished
    from camera.pruning.stages import prune as prune_scored
    from camera.pruning.summary import SUMMARY
    from camera.report.card import write_card

    if (calibration is None) == (scores is None):
        raise CameraError("give either calibration (to go from capture to save) or scores (to prune alone)")
    out, options, capture = Path(out), options or PruneOptions(), capture or CaptureOptions()
    refuse_occupied(out)
    if scores is not None and (options.method != "camera" or options.sparsity):
        raise CameraError(
            f"method {options.method} with sparsity {options.sparsity} needs activations: give calibration, not scores"
        )
    checkpoint = open_checkpoint(model)
    if scores is not None:
        with atomic_folder(out) as folder:
            prune_scored(checkpoint, Path(scores), folder, plan_prune(checkpoint, capture, options), options)
        return dict(read_json(out / SUMMARY))
    assert calibration is not None
    devices_of(capture.device, capture.devices)
    tokens_ST = calibration_windows(calibration, checkpoint)
    summary: dict[str, Any] = {}

    def add_card(made: Path, pruned: Path) -> None:
        write_card(made, checkpoint, pruned, base_model=checkpoint.folder.resolve().name, name=out.name)
        summary.update(read_json(pruned / SUMMARY))

    try:
        prune_checkpoint(checkpoint, tokens_ST, out, capture, options, progress, add_card)
    except CameraError as error:
        if not unfinished(out).is_dir() or isinstance(error, LockedError):
            raise
        raise CameraError(
            f"{error}\nWhat was done is kept in {unfinished(out)}: the same command goes on there; remove it if it is not "
            "wanted"
        ) from error
    return summary


def save(model: Place, pruned: Place, out: Place, progress: Progress = silent) -> None:
    """Write the pruned model as a standard Hugging Face folder, and compare what was written.

    Example: `camera save MODEL pruned out`

    Args:
        model: folder of the source checkpoint.
        pruned: folder of `prune` with scores.
        out: folder to make.
        progress: told of bytes.
    """
    from camera.files import atomic_folder
    from camera.pruning.stages import save as run
    from camera.report.card import write_card

    checkpoint = open_checkpoint(model)
    with atomic_folder(Path(out)) as folder:
        run(checkpoint, Path(pruned), folder, progress)
        write_card(folder, checkpoint, Path(pruned), base_model=Path(model).name)


def imatrix(
    model: Place,
    out: Place,
    calibration: "CalibrationOptions | None" = None,
    options: "QuantizeOptions | None" = None,
    progress: Progress = silent,
) -> int:
    """Measure how much each input of a model's matrices matters, for `quantize` and for llama-quantize.

    Example: `camera imatrix MODEL imatrix.gguf --calibration text.txt`

    Args:
        model: folder of a Hugging Face checkpoint.
        out: the .gguf file to make.
        calibration: the text; the default is the built-in `stdlib`.
        options: of these only batch size, dtype and device.
        progress: told (samples done × layers, all).

    Returns:
        The number of tokens measured on.
    """
    from camera.data import calibration_windows
    from camera.files import refuse_occupied
    from camera.options import CalibrationOptions, QuantizeOptions
    from camera.quantization.imatrix import collect_imatrix, write_imatrix

    out, calibration = Path(out), calibration or CalibrationOptions()
    refuse_occupied(out)
    options = (options or QuantizeOptions()).model_copy(update={"method": "search"})
    checkpoint = open_checkpoint(model)
    tokens_ST = calibration_windows(calibration, checkpoint)
    source = calibration.name if calibration.path is None else calibration.path.name
    found = collect_imatrix(checkpoint, tokens_ST, options, progress, datasets=(source,))
    write_imatrix(out, found, checkpoint)
    return tokens_ST.numel()


def quantize(
    model: Place,
    out: Place,
    options: "QuantizeOptions | None" = None,
    calibration: "CalibrationOptions | None" = None,
    imatrix: Place | None = None,
    progress: Progress = silent,
) -> "QuantizeReport":
    """Pack a model's matrices into blocks. Calibration is for --method search and gptq, and for --target-bpw.

    Examples: `camera quantize MODEL packed --type q4_0_64 --method gptq --calibration text.txt`

    `camera quantize MODEL packed --target-bpw 4.5 --calibration text.txt`

    Args:
        model: folder of a Hugging Face checkpoint.
        out: folder to make.
        options: which block formats, and how weights are rounded.
        calibration: the text for methods that need one; the default is the built-in `stdlib`.
        imatrix: in place of a calibration text, a file of `imatrix` or of llama-imatrix.
        progress: told of matrices.

    Returns:
        The type of each tensor, and the bits per weight.
    """
    from camera.data import calibration_windows
    from camera.files import atomic_folder, refuse_occupied
    from camera.options import CalibrationOptions, QuantizeOptions
    from camera.quantization.execute import quantize_checkpoint
    from camera.quantization.imatrix import read_imatrix
    from camera.registry import QUANTIZATION_METHODS

    refuse_occupied(Path(out))
    options = options or QuantizeOptions()
    method = QUANTIZATION_METHODS[options.method]
    if imatrix is not None and (
        not options.calibrates or (method.calibrates and not method.reads_imatrix) or calibration is not None
    ):
        raise CameraError("imatrix goes with method search or target_bpw, in place of calibration")
    if calibration is not None and not options.calibrates:
        raise CameraError(
            "calibration goes with method search or gptq, or target_bpw; rtn looks at the weights alone"
        )
    checkpoint = open_checkpoint(model)
    matrix = None if imatrix is None else read_imatrix(Path(imatrix), checkpoint)
    tokens_ST = None
    if options.calibrates and matrix is None:
        tokens_ST = calibration_windows(calibration or CalibrationOptions(), checkpoint)
    with atomic_folder(Path(out)) as folder:
        return quantize_checkpoint(checkpoint, folder, options, tokens_ST, matrix, progress)


def convert(
    quantized: Place,
    out: Place,
    name: str | None = None,
    twin: Literal["q4_0"] | None = None,
    progress: Progress = silent,
) -> list[Path]:
    """Write a GGUF file with tokenizer, chat template and metadata.

    Example: `camera convert packed model-q4_0_64.gguf --twin q4_0`

    Args:
        quantized: folder of `quantize`.
        out: the .gguf file to make.
        name: `general.name`; the default is the file's name.
        twin: also write the lossless Q4_0 twin of a Q4_0_64 file, `<name>-q4_0-twin.gguf` beside it.
        progress: told of bytes.

    Returns:
        The files made.
    """
    from camera.files import refuse_occupied
    from camera.formats.convert import convert_to_gguf, write_twin

    out = Path(out)
    twin_path = out.with_name(f"{out.stem}-q4_0-twin.gguf")
    files = [out, twin_path] if twin else [out]
    for path in files:
        refuse_occupied(path)
    convert_to_gguf(Path(quantized), out, name=name or out.stem, lineage=None, progress=progress)
    if twin:
        write_twin(out, twin_path)
    return files


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model."""

    perplexity: "PerplexityResult | None"
    """None where only tasks were asked for."""
    divergence: "DivergenceResult | None"
    """From the reference on the text, where there is one."""
    tasks: "Mapping[str, TaskScore]"
    """Accuracy by task, and how it differs from the reference's."""
    reference_tasks: "Mapping[str, TaskScore]"
    samples: "Sequence[Sample]" = ()
    """What it writes after a few prompts, where that was asked for."""


def evaluate(
    model: Place,
    text: "DatasetOptions | None" = None,
    options: "EvaluateOptions | None" = None,
    reference: Place | None = None,
    tokenizer: Place | None = None,
    out: Place | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure perplexity on a held-out text, accuracy on tasks, and with --reference what was lost against a model.

    Without --text and --tasks the text is the test part of `stdlib`. --tasks nine: those of the Ascend version of
    CAMERA.

    Examples: `camera evaluate MODEL --text wikitext2 --window 2048`

    `camera evaluate PRUNED --reference ORIGINAL --tasks nine --task-folder tasks --out results`

    Args:
        model: a checkpoint, a quantised folder or a GGUF file.
        text: the text.
        options: window, batch size, dtype, device, tasks.
        reference: also measure how far the model is from this one: KL divergence, and differences in accuracy on the
            same questions.
        tokenizer: folder with the tokenizer, for a GGUF file.
        out: tasks: keep each result here. The same call goes on with those not done.
        progress: told of windows or requests, once for each measurement.
    """
    from camera.evaluation.lm_eval_tasks import NINE_TASKS
    from camera.options import EvaluateOptions

    options = options or EvaluateOptions()
    if options.tasks == ("nine",):
        options = options.model_copy(update={"tasks": NINE_TASKS})
    if out is not None and not options.tasks:
        raise CameraError("out goes with tasks: perplexity is measured in one go")
    folder = Path(tokenizer or model)
    if folder.is_file():
        raise CameraError(f"{model} is a GGUF file: name the folder with its tokenizer (--tokenizer FOLDER)")
    measured: tuple[Any, Any] = (None, None)
    if text is not None or not options.tasks:
        measured = _on_text(model, text, options, reference, folder, progress)
    scores = _on_tasks(model, options, reference, folder, out, progress) if options.tasks else ({}, {})
    written = []
    if options.samples:
        from camera.evaluation.samples import write_samples

        written = write_samples(Path(model), options.samples, options.dtype, options.device, folder)
    return Evaluation(*measured, *scores, written)


def _on_text(
    model: Place,
    text: "DatasetOptions | None",
    options: "EvaluateOptions",
    reference: Place | None,
    tokenizer: Path,
    progress: Progress,
) -> "tuple[PerplexityResult, DivergenceResult | None]":
    from camera.checkpoints.tokenizer import load_tokenizer
    from camera.data import evaluation_tokens
    from camera.evaluation.divergence import divergence
    from camera.evaluation.perplexity import perplexity
    from camera.evaluation.text_model import open_text_model
    from camera.evaluation.windows import TextSettings
    from camera.options import DatasetOptions

    source = text or DatasetOptions(split="test")
    tokens_N = evaluation_tokens(source, load_tokenizer(tokenizer), options.window)
    how = options.model_dump(include=set(TextSettings.__annotations__))
    # Opened once, whole or to run layer by layer, for both measurements.
    opened = open_text_model(Path(model), options.dtype, options.device, options.layer_by_layer)
    found = perplexity(opened, tokens_N, **how, progress=progress)
    if reference is None:
        return found, None
    return found, divergence(Path(reference), opened, tokens_N, **how, progress=progress)


def _on_tasks(
    model: Place,
    options: "EvaluateOptions",
    reference: Place | None,
    tokenizer: Path,
    out: Place | None,
    progress: Progress,
) -> "tuple[Mapping[str, TaskScore], Mapping[str, TaskScore]]":
    """Scores of the model, and those of the reference."""
    from camera.evaluation.tasks import evaluate_tasks
    from camera.report.scores import score_task

    how = {**options.on_tasks, "task_folder": options.task_folder}
    measured = {}
    for label, path in (("reference", reference), ("model", model)):
        if path is not None:
            measured[label] = evaluate_tasks(
                Path(path),
                options.tasks,
                tokenizer=tokenizer,
                out=None if out is None else Path(out) / label,
                progress=lambda task, done, total: progress(done, total),
                **how,
            )
    originals = measured.get("reference", {})
    return (
        {task: score_task(result, originals.get(task)) for task, result in measured["model"].items()},
        {task: score_task(result, None) for task, result in originals.items()},
    )


def bench(
    models: Sequence[Place],
    options: "BenchmarkOptions | None" = None,
    baseline: Place | None = None,
    progress: Progress = silent,
) -> "BenchmarkReport":
    """Time prefill and decode, alternately with a baseline.

    Example: `camera bench pruned-q4_0_64.gguf --baseline unpruned-q4_0.gguf --decode 256 --decode 1024`

    Args:
        models: checkpoints, quantised folders or GGUF files.
        options: engines, lengths, repeats, device.
        baseline: the model to compare with.
        progress: told of timed runs.
    """
    from camera.benchmark.bench import BenchModel, run_benchmark
    from camera.options import BenchmarkOptions

    chosen = [*([] if baseline is None else [baseline]), *models]
    entries = [
        BenchModel(label=Path(each).name, path=Path(each), baseline=baseline is not None and index == 0)
        for index, each in enumerate(chosen)
    ]
    return run_benchmark(entries, options or BenchmarkOptions(), progress)


@dataclass(frozen=True)
class Checked:
    """A device, checked."""

    report: "CheckReport"
    page: Path
    """The report for people."""
    archive: Path
    """To send back: report, page, logs, digests; no paths, names or tokens of this host."""


def npu_check(out: Place, options: "CheckOptions | None" = None, progress: "Tell | None" = None) -> Checked:
    """Try and measure all that only a card can tell, and write a report and one archive to send back.

    Each step runs in a process of its own with a time-out. The same command goes on after a kill: what passed stays, the rest
    is tried again. The exit code is 0 if all that applies here passed.

    Example: `camera npu-check check --llama-cpp llama.cpp/build/bin`

    Args:
        out: folder to make, or that of a run to go on with.
        options: which device, and how much of it.
        progress: told of each step as it begins and ends.
    """
    from camera.device_check.archive import PAGE, write_report
    from camera.device_check.runner import check
    from camera.options import CheckOptions

    out, options = Path(out), options or CheckOptions()
    report = check(options, out, progress)
    return Checked(report, out / PAGE, write_report(report, options, out))
