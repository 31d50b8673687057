"""GGUF convert as a stage."""

from collections.abc import Iterable
from pathlib import Path

from camera.files import read_json
from camera.formats.convert import convert_to_gguf, write_twin
from camera.options import BlockType, Options
from tasks.estimate import Known, Needs
from tasks.lineage import portable
from tasks.stage import Context, Stage, register
from tasks.store import MANIFEST

_REORDERED_BYTES = 256 << 20
"""A matrix whose rows change places, packed, several times over; a square of 16,384 columns takes a third of it."""


class ConvertOptions(Options):
    """What the GGUF is called."""

    name: str
    twin: BlockType | None = None
    """Type of the lossless twin to write as well."""


def gguf_of(folder: Path) -> Path:
    """The main GGUF file of a converted artifact (its twin, if there is one, lies beside it), as its manifest names it."""
    return main_gguf(folder / name for name in read_json(folder / MANIFEST)["files"])


def main_gguf(paths: Iterable[Path]) -> Path:
    """Of the files of a converted artifact, the main GGUF."""
    return next(
        path
        for path in sorted(paths)
        if path.suffix == ".gguf" and not path.name.endswith("-twin.gguf") and not path.name.startswith(".")
    )


def run(context: Context) -> dict[str, float]:
    asked, lineage = context.options.of(ConvertOptions), portable(context.lineage)
    main = context.out / f"{asked.name}.gguf"
    convert_to_gguf(
        context.inputs["quantized"], main, name=asked.name, lineage=lineage, progress=context.progress
    )
    if asked.twin is not None:
        write_twin(main, context.out / f"{asked.name}-{asked.twin}-twin.gguf")
    return {"bytes": main.stat().st_size}


def needs(known: Known) -> Needs:
    """The packed weights once more; twice with a twin. A tensor is in memory only if its rows change places."""
    files = 1 if known.options.of(ConvertOptions).twin is None else 2
    return Needs(disk=files * known.size("quantized"), memory=min(2 * known.largest, _REORDERED_BYTES))


STAGE = register(Stage("convert", 4, run, {"convert": ConvertOptions}, needs, intermediate=True))
