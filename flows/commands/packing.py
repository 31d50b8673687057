"""From a checkpoint to 4 bits and GGUF: quantize, convert. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import checked, print_json, progress_bar, say
from flows.commands.flags import (
    Block,
    Json,
    Model,
    Out,
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
