"""The stages of compression as functions of paths and options: what `import camera` offers, and what the commands call.

Options left out are the defaults of `camera.options`. A `progress` is told (units done, units in all). What the user can
mend is a CameraError. docs/library.md shows each function at work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import atomic_folder, refuse_occupied
from camera.options import (
    BenchmarkOptions,
    CalibrationOptions,
    DatasetOptions,
    EvaluateOptions,
    QuantizeOptions,
)
from camera.progress import Progress, silent

if TYPE_CHECKING:
    from camera.benchmark.report import BenchmarkReport
    from camera.evaluation.divergence import DivergenceResult
    from camera.evaluation.perplexity import PerplexityResult
    from camera.formats.quantized_model import QuantizeReport

Place = Path | str


def open_checkpoint(folder: Place) -> Checkpoint:
    """Open the folder of a Hugging Face checkpoint: its config, its family, its tensors, read one at a time.

    Raises:
        CameraError: if it is none, damaged, of a family that is not supported, or its shapes contradict its config.
    """
    checkpoint = Checkpoint.open(Path(folder))
    checkpoint.check_shapes()
    return checkpoint


def quantize(
    model: Place,
    out: Place,
    options: QuantizeOptions | None = None,
    calibration: CalibrationOptions | None = None,
    imatrix: Place | None = None,
    progress: Progress = silent,
) -> "QuantizeReport":
    """Pack a model's matrices into blocks, in the folder `out`.

    Args:
        model: folder of a checkpoint.
        out: folder to make.
        options: which block formats, and how weights are rounded.
        calibration: the text for methods that need one; the default is the built-in `stdlib`.
        imatrix: in its place, a file of `camera.imatrix` or llama-imatrix.
        progress: told of matrices.

    Returns:
        The type of each tensor, and the bits per weight.
    """
    from camera.data import calibration_windows
    from camera.quantization.imatrix import read_imatrix
    from camera.quantization.quantize_calibrated import quantize_calibrated

    options = options or QuantizeOptions()
    if imatrix is not None and (
        not options.calibrates or options.method == "gptq" or calibration is not None
    ):
        raise CameraError("an imatrix goes with method search or target_bpw, in place of calibration")
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
        return quantize_calibrated(checkpoint, folder, options, tokens_ST, matrix, progress)


def imatrix(
    model: Place,
    out: Place,
    calibration: CalibrationOptions | None = None,
    options: QuantizeOptions | None = None,
    progress: Progress = silent,
) -> int:
    """Measure how much each input of a model's matrices matters, for `quantize` and for llama-quantize.

    Args:
        model: folder of a checkpoint.
        out: the .gguf file to make.
        calibration: the text; the default is the built-in `stdlib`.
        options: of these only batch size, dtype and device.
        progress: told (samples done × layers, all).

    Returns:
        The number of tokens measured on.
    """
    from camera.data import calibration_windows
    from camera.quantization.imatrix import collect_imatrix, write_imatrix

    out = Path(out)
    refuse_occupied(out)
    calibration = calibration or CalibrationOptions()
    options = (options or QuantizeOptions()).model_copy(update={"method": "search"})
    checkpoint = open_checkpoint(model)
    tokens_ST = calibration_windows(calibration, checkpoint)
    source = calibration.name if calibration.path is None else calibration.path.name
    found = collect_imatrix(checkpoint, tokens_ST, options, progress, datasets=(source,))
    write_imatrix(out, found, checkpoint.family, checkpoint.layer_count)
    return tokens_ST.numel()


def convert(
    quantized: Place,
    out: Place,
    name: str | None = None,
    twin: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """Write a GGUF file with tokenizer, chat template and metadata.

    Args:
        quantized: folder of `quantize`.
        out: the .gguf file to make.
        name: `general.name`; the default is the file's name.
        twin: also write the lossless Q4_0 twin of a Q4_0_64 file, `<name>-q4_0-twin.gguf` beside it.
        progress: told of bytes.

    Returns:
        The files made.
    """
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
    """What a model is worth on a text."""

    perplexity: "PerplexityResult"
    divergence: "DivergenceResult | None"
    """From the reference, where there is one."""


def evaluate(
    model: Place,
    text: DatasetOptions | None = None,
    options: EvaluateOptions | None = None,
    reference: Place | None = None,
    tokenizer: Place | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure perplexity on a held-out text, and how far a model is from a reference.

    Args:
        model: a checkpoint, a folder of `quantize`, or a GGUF file.
        text: the text; the default is the test part of the built-in `stdlib`.
        options: window, batch size, dtype, device.
        reference: a model to compare next-token distributions with.
        tokenizer: folder with the tokenizer, for a GGUF file.
        progress: told of windows, once for each measurement.
    """
    from camera.checkpoints.tokenizer import load_tokenizer
    from camera.data import evaluation_tokens
    from camera.evaluation.divergence import divergence
    from camera.evaluation.perplexity import perplexity
    from camera.evaluation.text_model import open_text_model
    from camera.evaluation.windows import TextSettings

    options = options or EvaluateOptions()
    tokens_N = evaluation_tokens(
        text or DatasetOptions(split="test"),
        load_tokenizer(tokenizer_folder(model, tokenizer)),
        options.window,
    )
    how = options.model_dump(include=set(TextSettings.__annotations__))
    # Opened once, whole or to run layer by layer, for both measurements.
    opened = open_text_model(Path(model), options.dtype, options.device, options.layer_by_layer)
    found = perplexity(opened, tokens_N, **how, progress=progress)
    if reference is None:
        return Evaluation(found, None)
    return Evaluation(found, divergence(Path(reference), opened, tokens_N, **how, progress=progress))


def tokenizer_folder(model: Place, tokenizer: Place | None) -> Path:
    """Where a model's tokenizer is: in its own folder, unless another is named.

    Raises:
        CameraError: if that is no folder, as of a GGUF file.
    """
    folder = Path(tokenizer or model)
    if folder.is_file():
        raise CameraError(f"{model} is a GGUF file: name the folder with its tokenizer (--tokenizer FOLDER)")
    return folder


def bench(
    models: Sequence[Place],
    options: BenchmarkOptions | None = None,
    baseline: Place | None = None,
    progress: Progress = silent,
) -> "BenchmarkReport":
    """Time prefill and decode of models, alternately with a baseline.

    Args:
        models: checkpoints, folders of `quantize` or GGUF files.
        options: engines, lengths, repeats, device.
        baseline: the model that the others are compared with.
        progress: told of timed runs.
    """
    from camera.benchmark.bench import BenchModel, run_benchmark

    chosen = [*([] if baseline is None else [Path(baseline)]), *map(Path, models)]
    entries = [
        BenchModel(label=path.name, path=path, baseline=baseline is not None and index == 0)
        for index, path in enumerate(chosen)
    ]
    return run_benchmark(entries, options or BenchmarkOptions(), progress)
