"""What several commands of the pipeline share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tasks.project import Project

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; see recipes/.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Replace a field, e.g. prune.ratio=0.3; may be repeated."
    ),
]
NoPrefect = Annotated[bool, typer.Option("--no-prefect", help="The same stages and store in a plain loop.")]
Signers = Annotated[
    Path | None, typer.Option(help="ssh's allowed signers, whose signatures count.", show_default=False)
]


def here() -> "Project":
    """The project of the current directory; the tools that it stands on are set up for it."""
    import os

    from flows.secret import know_own_servers
    from tasks.project import Project

    project = Project.here()
    project.configure()
    know_own_servers(project, os.environ)
    return project


def check_signers(signers: Path | None, required: bool) -> None:
    """Refuse to require a signature of nobody.

    Raises:
        CameraError: if a signature is required, and neither the command nor the project says whose count.
    """
    from camera.errors import CameraError

    if required and signers is None:
        raise CameraError(
            "a signature is required, and nobody is named whose counts: give --signers, ssh's list of allowed signers, "
            "or put it into the project as .camera/allowed_signers"
        )
