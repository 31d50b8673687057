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
    calibration: "CalibrationOptions | None" = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="In place of --calibration: a file of `camera imatrix` or llama-imatrix."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model's matrices into blocks. Calibration is for --method search and gptq, and for --target-bpw.

    Examples: `camera quantize MODEL packed --type q4_0_64 --method gptq --calibration text.txt`

    `camera quantize MODEL packed --target-bpw 4.5 --calibration text.txt`
    """
    from camera import api

    with progress_bar("quantize") as progress:
        report = api.quantize(model, out, options, calibration, imatrix, progress)
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
    options: Annotated["QuantizeOptions", Flags("batch_size", "dtype", "device")],
    calibration: "CalibrationOptions | None" = None,
) -> None:
    """Measure how much each input of a model's matrices matters, for `quantize` and for llama-quantize.

    Example: `camera imatrix MODEL imatrix.gguf --calibration text.txt`
    """
    from camera import api

    with progress_bar("imatrix") as progress:
        tokens = api.imatrix(model, out, calibration, options, progress)
    say(f"importance matrix of {tokens} tokens: {out}")


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
    from camera import api

    with progress_bar("convert") as progress:
        made = api.convert(quantized, out, name, twin is not None, progress)
    for label, path in zip(("gguf", "twin"), made, strict=False):
        say(f"{label}: {path}")
