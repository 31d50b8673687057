"""The parameters of the deployments as types, so that the server and its UI refuse a wrong one before a run exists."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from prefect.runtime import flow_run
from pydantic import BaseModel, Field

from camera.escape import one_line
from tasks.recipe import Recipe, load_recipe


def override_pattern(model: type[BaseModel] = Recipe) -> str:
    """A regular expression, for Python, Rust and JavaScript alike, of `field=value` for every field of a model."""
    paths = "|".join(re.escape(path).replace(r"\-", "-") + more for path, more in _paths(model))
    return rf"^(?:{paths})=[\s\S]*$"


def _paths(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, UnionType):  # an optional section
            inner = next(iter(get_args(inner)))
        is_mapping = get_origin(inner) is dict
        yield f"{before}{name}", r"(?:\.[^=]+)?" if is_mapping else ""
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _paths(inner, f"{before}{name}.")


RecipeFile = Annotated[
    str,
    Field(
        pattern=r"\S",
        description="Path of a YAML recipe, relative to the folder the deployment was made in: recipes/demo.yaml",
    ),
]
Override = Annotated[
    str,
    Field(
        pattern=override_pattern(),
        description="field=value, as with `camera run --set`: prune.ratio=0.3. Only fields that a recipe has.",
    ),
]


def given_recipe(recipe: str | Recipe, overrides: list[str] | None) -> Recipe:
    """The recipe of a flow's parameters: as it is given, or read from the file that is named.

    Raises:
        CameraError: if there is no such file, or a field of it is wrong.
    """
    return recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides or [])


def run_name() -> str:
    """Name of the flow run that begins: `compress recipes/demo.yaml`, or with the recipe's name where it came whole."""
    given = flow_run.parameters["recipe"]
    return one_line(f"{flow_run.flow_name} {given.name if isinstance(given, Recipe) else given}")
