"""GGUF convert as a stage."""

from collections.abc import Iterable
from pathlib import Path

from camera.formats.convert import convert_to_gguf, write_twin
from tasks.lineage import portable
from tasks.stage import Context, Stage


def gguf_of(folder: Path) -> Path:
    """The main GGUF file of a converted artifact (its twin, if there is one, lies beside it)."""
    return main_gguf(folder.iterdir())


def main_gguf(paths: Iterable[Path]) -> Path:
    """Of the files of a converted artifact, the main GGUF."""
    return next(
        path
        for path in sorted(paths)
        if path.suffix == ".gguf" and not path.name.endswith("-twin.gguf") and not path.name.startswith(".")
    )


def run(context: Context) -> dict[str, float]:
    name, twin = context.options["name"], context.options["twin"]
    main = context.out / f"{name}.gguf"
    convert_to_gguf(
        context.inputs["quantized"],
        main,
        name=name,
        lineage=portable(context.lineage),
        progress=context.progress,
    )
    if twin is not None:
        write_twin(main, context.out / f"{name}-{twin}-twin.gguf")
    return {"bytes": main.stat().st_size}


STAGE = Stage("convert", version=1, run=run)
