"""The form of lineage.json, which an audit checks; `python -m tasks.lineage_form` prints it as a JSON Schema."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from camera.digests import digest_files, digest_json, files_below
from camera.errors import CameraError
from tasks.store import LINEAGE, Digests

SCHEMA = 2
"""Version of the form. 2: `options` by section, and `facts`."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class DvcVersion(_Form):
    """A version of data that DVC keeps."""

    file: str
    """The .dvc file, relative to the repository."""
    md5: str
    """DVC's own hash; `.dir` at the end for a folder."""


class SourceEntry(_Form):
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


class InputEntry(_Form):
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


class StageEntry(_Form):
    """One stage that was performed, and the artifact that came out."""

    step: str
    """What people call it: `quantize baseline`."""
    stage: str
    """The kind of work."""
    version: int
    """Of the meaning of this kind of work."""
    key: Sha256
    """sha256 of the canonical JSON of stage, version, options, facts and the digests of the inputs."""
    digest: Sha256
    """Content digest of the artifact: sha256 of the canonical JSON of the sha256 of all its files, by name."""
    options: dict[str, Any]
    """What was asked for, by section; in version 1 without sections."""
    facts: dict[str, Any] | None = None
    """What else the result depends on, such as the name of the device; part of the key unless it is left out."""
    inputs: dict[str, InputEntry]
    """By the stage's own names."""
    outcome: dict[str, float] | None = None
    """What pruning made of a mixture of experts: `experts_kept` in each layer, `kept_width` of each, `removed_share` of
    all their channels."""
    environment: Environment | None = None
    """Left out inside a GGUF, whose bytes do not depend on it."""


class OwnStageEntry(StageEntry):
    """An artifact's own entry in its own lineage, which cannot hold its own digest."""

    digest: Sha256 | None = None  # type: ignore[assignment]  # wider than the parent's on purpose


class Lineage(_Form):
    """What a GGUF or an artifact of the store descends from."""

    version: Literal[1, 2] = Field(alias="schema")
    """Version of this form."""
    sources: dict[Sha256, SourceEntry]
    """By digest."""
    stages: dict[Sha256, StageEntry]
    """By key."""
    artifact: OwnStageEntry | None = None
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


def own_digest_holds(lineage: dict[str, Any]) -> bool:
    """Whether a published lineage has the digest that it names: nothing of it was changed after publishing."""
    body = {field: value for field, value in lineage.items() if field != "digest"}
    return digest_json(body) == lineage.get("digest")


def damages(folder: Path, lineage: dict[str, Any], digests: Digests = digest_files) -> Iterator[str]:
    """All that is wrong with a published folder: its lineage's own digest, and each file by name. Hashes every byte.

    Args:
        folder: what was published.
        lineage: what its lineage.json says.
        digests: what hashes.
    """
    if not own_digest_holds(lineage):
        yield f"{folder / LINEAGE} does not have its own digest: it was changed after publishing"
    present = digests(folder, [name for name in files_below(folder) if name != LINEAGE])
    for name in sorted(lineage["files"].keys() | present.keys()):
        if name not in present:
            yield f"{folder / name} is missing"
        elif name not in lineage["files"]:
            yield f"{folder / name} is not part of the publication"
        elif present[name] != lineage["files"][name]:
            yield f"{folder / name} does not have the sha256 in {LINEAGE}"


def json_schema() -> str:
    """JSON Schema 2020-12 of a published folder's lineage.json, as text."""
    schema = Publication.model_json_schema(by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2)


if __name__ == "__main__":
    sys.stdout.write(json_schema() + "\n")
