"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer


def _free(out: Path) -> Path:
    """Refuse an occupied output before any work is done for it."""
    from camera.files import refuse_occupied

    refuse_occupied(out)
    return out


Model = Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)]
Out = Annotated[
    Path,
    typer.Argument(help="Folder to write; must not exist with content.", show_default=False, callback=_free),
]
OutFile = Annotated[Path, typer.Argument(help="The .gguf file to write.", show_default=False, callback=_free)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
