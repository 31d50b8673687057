"""From a checkpoint to 4 bits and GGUF: quantize, convert. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import checked, dataset, print_json, progress_bar, say
from flows.commands.flags import (
    BatchSize,
    Block,
    Calibration,
    Device,
    DType,
    DTypeOption,
    Json,
    Length,
    Method,
    Model,
    Out,
    Samples,
    Seed,
)


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
    method: Annotated[
        Method, typer.Option(help="rtn: to the nearest. search and gptq: for the calibration tokens.")
    ] = Method.rtn,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="For search, gptq and --target-bpw: as --calibration of capture; the default is stdlib."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="For search and --target-bpw: a file of `camera imatrix` or llama-imatrix."),
    ] = None,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    damping: Annotated[float, typer.Option(help="For gptq: more trusts the calibration less.")] = 0.01,
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Bits per weight of the whole: finer types for the matrices that need them most."),
    ] = None,
    sort_channels: Annotated[
        bool,
        typer.Option("--sort-channels", help="Order the FFN channels by size, for the blocks of down_proj."),
    ] = False,
    batch_size: BatchSize = 8,
    dtype: DTypeOption = DType.float32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Pack a model's matrices into blocks.

    Examples: `camera quantize MODEL packed --type q4_0_64 --method gptq --calibration text.txt`;
    `camera quantize MODEL packed --target-bpw 4.5 --calibration text.txt`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_windows
    from camera.errors import CameraError
    from camera.files import whole_folder
    from camera.options import CalibrationOptions, QuantizeOptions
    from camera.quantization.imatrix import read_imatrix
    from camera.quantization.quantize_calibrated import quantize_calibrated

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
        method=method,
        damping=damping,
        target_bpw=target_bpw,
        sort_channels=sort_channels,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    if imatrix is not None and (not options.calibrates or method is Method.gptq or calibration is not None):
        raise CameraError("--imatrix goes with --method search or --target-bpw, in place of --calibration")
    if calibration is not None and not options.calibrates:
        raise CameraError(
            "--calibration goes with --method search or gptq, or --target-bpw; rtn looks at the weights alone"
        )
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    matrix = None if imatrix is None else read_imatrix(imatrix, checkpoint)
    tokens_ST = None
    if options.calibrates and matrix is None:
        text = checked(
            CalibrationOptions, **dataset(calibration or "stdlib"), samples=samples, length=length, seed=seed
        )
        tokens_ST = calibration_windows(text, checkpoint)
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
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.", show_default=False)],
    calibration: Calibration = "stdlib",
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: DTypeOption = DType.float32,
    device: Device = "auto",
) -> None:
    """Measure how much each input of a model's matrices matters, for `quantize` and for llama-quantize.

    Example: `camera imatrix MODEL imatrix.gguf --calibration text.txt`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_windows
    from camera.files import refuse_occupied
    from camera.options import CalibrationOptions, QuantizeOptions
    from camera.quantization.imatrix import collect_imatrix, write_imatrix

    refuse_occupied(out)
    options = checked(QuantizeOptions, method="search", batch_size=batch_size, dtype=dtype, device=device)
    text = checked(CalibrationOptions, **dataset(calibration), samples=samples, length=length, seed=seed)
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    tokens_ST = calibration_windows(text, checkpoint)
    with progress_bar("imatrix") as progress:
        found = collect_imatrix(checkpoint, tokens_ST, options, progress, datasets=(Path(calibration).name,))
    write_imatrix(out, found, checkpoint.family, checkpoint.layer_count)
    say(f"importance matrix of {tokens_ST.numel()} tokens: {out}")


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
