"""The flags of commands that read a recipe."""

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; see recipes/.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Replace a field, e.g. prune.ratio=0.3; may be repeated."
    ),
]
