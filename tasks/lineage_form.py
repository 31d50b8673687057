"""The form of lineage.json, which an audit checks; `python -m tasks.lineage_form` prints it as a JSON Schema."""

import json
import sys
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from camera.errors import CameraError

SCHEMA = 1
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class DvcVersion(_Form):
    """A version of data that DVC keeps."""

    file: str
    """The .dvc file, relative to the repository."""
    md5: str
    """DVC's own hash; `.dir` at the end for a folder."""


class Source(_Form):
    """Something from outside the store: the source model, its tokenizer, a text."""

    name: str
    """What the stage that reads it calls it."""
    digest: Sha256
    """sha256 of the canonical JSON of `files`."""
    path: str
    """As the recipe names it: a path, or `organisation/name` on the Hugging Face hub."""
    files: dict[str, Sha256]
    """sha256 of every file, by name."""
    revision: str | None = None
    """For a model of the hub: the commit."""
    dvc: DvcVersion | None = None
    """Where DVC tracks it."""


class Input(_Form):
    """What a stage read."""

    digest: Sha256
    """Content digest: of a source, or of the artifact of another stage."""
    stage: str | None = None
    """The other stage; null for a source."""
    key: Sha256 | None
    """Its key; null for a source."""


class Environment(_Form):
    """What a stage ran with."""

    camera: str
    """Version of this package."""
    commit: str | None
    """git commit of its code, with `+` if files differed from it; null outside a checkout."""
    python: str
    machine: str
    """Kind of processor: `x86_64`, `aarch64`."""
    packages: dict[str, str]
    """Versions of what decides numbers."""
    device: str | None = None
    """Kind of device, where the stage computes on one."""


class Stage(_Form):
    """One stage that was performed, and the artifact that came out."""

    step: str
    """What people call it: `quantize baseline`."""
    stage: str
    """The kind of work."""
    version: int
    """Of the meaning of this kind of work."""
    key: Sha256
    """sha256 of the canonical JSON of stage, version, options and the digests of the inputs."""
    digest: Sha256
    """Content digest of the artifact: sha256 of the canonical JSON of the sha256 of all its files, by name."""
    options: dict[str, Any]
    """What was asked for."""
    inputs: dict[str, Input]
    """By the stage's own names."""
    environment: Environment | None = None
    """Left out inside a GGUF, whose bytes do not depend on it."""


class OwnStage(Stage):
    """An artifact's own entry in its own lineage, which cannot hold its own digest."""

    digest: Sha256 | None = None  # type: ignore[assignment]  # wider than the parent's on purpose


class Lineage(_Form):
    """What a GGUF or an artifact of the store descends from."""

    version: Literal[1] = Field(alias="schema")
    """Version of this form."""
    sources: dict[Sha256, Source]
    """By digest."""
    stages: dict[Sha256, Stage]
    """By key."""
    artifact: OwnStage | None = None
    """In the store only: the artifact that the file lies in."""


class Publication(Lineage):
    """lineage.json of a published folder: all of a lineage, and what was published."""

    name: str
    """Of the model."""
    recipe: dict[str, Any]
    """The whole recipe, without its sections `tracking` and `publish`."""
    files: dict[str, Sha256]
    """sha256 of every published file but lineage.json, by name."""
    environment: Environment
    """What the publication was made with."""
    references: dict[str, str]
    """Where else the run is recorded: `mlflow_run`, `prefect_run`."""
    digest: Sha256
    """sha256 of the canonical JSON of this document without this field: UTF-8, keys sorted, no white space."""


def check_lineage(value: Any, where: str) -> dict[str, Any]:
    """A lineage that came from elsewhere, once its form is the published one.

    Raises:
        CameraError: naming the first field that is not.
    """
    number = value.get("schema") if isinstance(value, dict) else None
    if isinstance(number, int) and number > SCHEMA:
        raise CameraError(
            f"{where} is of schema {number}, and this version reads up to {SCHEMA}: install a newer one"
        )
    form = Publication if isinstance(value, dict) and "files" in value else Lineage
    try:
        form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        raise CameraError(f"{where} is no lineage of this pipeline: {field}: {first['msg']}") from None
    lineage: dict[str, Any] = value
    return lineage


def json_schema() -> str:
    """JSON Schema 2020-12 of a published folder's lineage.json, as text."""
    schema = Publication.model_json_schema(by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2)


if __name__ == "__main__":
    sys.stdout.write(json_schema() + "\n")
