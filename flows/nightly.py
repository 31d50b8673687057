"""The Prefect flow `nightly`: a list of recipes, each as a run of its own; one that fails does not stop the others."""

from typing import Annotated

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from camera.errors import CameraError
from camera.escape import one_line
from flows.compress import compress
from flows.parameters import Override, RecipeFile
from flows.recovery import running_flow

_PREFIX = "Flow run encountered an exception: "


@flow(name="nightly", persist_result=False)
def nightly(
    recipes: Annotated[list[RecipeFile], Field(min_length=1)], overrides: list[Override] | None = None
) -> None:
    """Run every recipe, one after the other.

    Args:
        recipes: paths of recipes, relative to the folder the deployment was made in.
        overrides: fields to replace in all of them.

    Raises:
        CameraError: at the end, naming the recipes that failed and why.
    """
    failed: dict[str, str] = {}
    rows = []
    with running_flow():
        for recipe in recipes:
            state = compress(recipe, overrides, return_state=True)
            if not state.is_completed():
                failed[recipe] = (state.message or state.name or "did not complete").removeprefix(_PREFIX)
            cells = {"recipe": recipe, "state": state.name, "reason": failed.get(recipe, "")}
            rows.append({column: one_line(cell) for column, cell in cells.items()})
        create_table_artifact(rows, key="nightly", description="What became of each recipe")
    if failed:
        reasons = "\n".join(f"  {recipe}: {reason}" for recipe, reason in failed.items())
        raise CameraError(f"{len(failed)} of {len(recipes)} recipes failed:\n{reasons}")
