"""Arguments and options that several commands take, each described once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Mode(StrEnum):
    physical = "physical"
    mask = "mask"


class Propagate(StrEnum):
    sequential = "sequential"
    one_shot = "one-shot"


class Score(StrEnum):
    energy = "energy"
    obs = "obs"


class Pattern(StrEnum):
    unstructured = "unstructured"
    two_of_four = "2:4"


class Allocation(StrEnum):
    uniform = "uniform"
    per_layer = "per_layer"


class Block(StrEnum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    q4_0_64 = "q4_0_64"


class Method(StrEnum):
    rtn = "rtn"
    search = "search"
    gptq = "gptq"


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
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; see recipes/.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Replace a field, e.g. prune.ratio=0.3; may be repeated."
    ),
]
NProc = Annotated[int, typer.Option("--nproc", min=1, help="Split the samples over so many processes.")]
