"""From a checkpoint to 4 bits and GGUF: quantize, imatrix, convert. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from camera.cli.options import Flags
from camera.cli.output import print_json, progress_bar, say
from camera.cli.parameters import Json, Model, Out, OutFile

if TYPE_CHECKING:
    from camera.options import CalibrationOptions, QuantizeOptions


def quantize(
    model: Model,
    out: Out,
    options: Annotated["QuantizeOptions", Flags(without=("twin",))],
    calibration: Annotated["CalibrationOptions", Flags(name="stdlib")],
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="For --method search and --target-bpw, instead of --calibration: a file of `camera imatrix` or "
            "llama-imatrix."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model's matrices into blocks. Calibration is for --method search and gptq, and for --target-bpw.

    Examples: `camera quantize MODEL packed --type q4_0_64 --method gptq --calibration text.txt`

    `camera quantize MODEL packed --target-bpw 4.5 --calibration text.txt`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_windows
    from camera.errors import CameraError
    from camera.files import whole_folder
    from camera.quantization.imatrix import read_imatrix
    from camera.quantization.quantize_calibrated import quantize_calibrated

    text_given = "name" in calibration.model_fields_set
    if imatrix is not None and (not options.calibrates or options.method == "gptq" or text_given):
        raise CameraError("--imatrix goes with --method search or --target-bpw, in place of --calibration")
    if text_given and not options.calibrates:
        raise CameraError(
            "--calibration goes with --method search or gptq, or --target-bpw; rtn looks at the weights alone"
        )
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    matrix = None if imatrix is None else read_imatrix(imatrix, checkpoint)
    calibrates = options.calibrates and matrix is None
    tokens_ST = calibration_windows(calibration, checkpoint) if calibrates else None
    with whole_folder(out) as folder, progress_bar("quantize") as progress:
        report = quantize_calibrated(checkpoint, folder, options, tokens_ST, matrix, progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    say(f"{report.bits_per_weight:.3f} bits per weight: {out}")
    if report.target_bpw is not None:
        for tensor in report.finer:
            say(f"  {tensor.name}: {tensor.type}")
    for tensor in report.tensors:
        if tensor.fallback:
            say(f"  {tensor.name}: {tensor.type}, because {tensor.fallback}")


def imatrix(
    model: Model,
    out: OutFile,
    calibration: Annotated["CalibrationOptions", Flags(name="stdlib")],
    options: Annotated["QuantizeOptions", Flags("batch_size", "dtype", "device", method="search")],
) -> None:
    """Measure how much each input of a model's matrices matters, for `quantize` and for llama-quantize.

    Example: `camera imatrix MODEL imatrix.gguf --calibration text.txt`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_windows
    from camera.quantization.imatrix import collect_imatrix, write_imatrix

    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    tokens_ST = calibration_windows(calibration, checkpoint)
    source = calibration.name if calibration.path is None else calibration.path.name
    with progress_bar("imatrix") as progress:
        found = collect_imatrix(checkpoint, tokens_ST, options, progress, datasets=(source,))
    write_imatrix(out, found, checkpoint.family, checkpoint.layer_count)
    say(f"importance matrix of {tokens_ST.numel()} tokens: {out}")


def convert(
    quantized: Annotated[Path, typer.Argument(help="Folder of `camera quantize`.", show_default=False)],
    out: OutFile,
    name: Annotated[str | None, typer.Option(help="general.name; the default is the file's name.")] = None,
    twin: Annotated[
        Literal["q4_0"] | None, typer.Option(help="Also write the lossless Q4_0 twin of a Q4_0_64 file.")
    ] = None,
) -> None:
    """Write a GGUF file with tokenizer, chat template and metadata.

    Example: `camera convert packed model-q4_0_64.gguf --twin q4_0`
    """
    from camera.files import refuse_occupied
    from camera.formats.convert import convert_to_gguf, write_twin

    twin_path = out.with_name(f"{out.stem}-q4_0-twin.gguf")
    if twin:
        refuse_occupied(twin_path)
    with progress_bar("convert") as progress:
        convert_to_gguf(quantized, out, name=name or out.stem, lineage=None, progress=progress)
    say(f"gguf: {out}")
    if twin:
        write_twin(out, twin_path)
        say(f"twin: {twin_path}")
