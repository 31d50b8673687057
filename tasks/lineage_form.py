"""The form of lineage.json, which an audit checks; `python -m tasks.lineage_form` prints it as a JSON Schema."""

import json
import re
import sys
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from camera.digests import digest_files, digest_json
from camera.errors import CameraError
from camera.escape import one_line
from camera.files import read_json
from tasks.contents import contents, kind
from tasks.store import LINEAGE, Digests

SCHEMA = 2
"""Version of the form. 2: `options` by section, and `facts`."""
PUBLICATION_SCHEMA = 3
"""Of a published folder's. 3: `made_of`."""
_STEERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, what breaks lines or turns the order of letters, halves of characters: no name of ours has them."""
_MAX_DEPTH = 64
_MAX_PATH = 4096


class NewerFormError(CameraError):
    """A lineage that a later version of this package wrote."""


def can_name(text: str) -> bool:
    """Whether a lineage takes such a name."""
    return not _STEERS.search(text) and len(text) <= _MAX_PATH


def _plain(text: str) -> str:
    if not can_name(text):
        raise ValueError("holds control characters, or is too long")
    return text


def _relative(name: str) -> str:
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("is no relative name of a file inside the folder")
    return name


def _finite(value: Any) -> Any:
    """JSON that has one canonical text."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                below += each
            elif isinstance(each, str) and any("\ud800" <= sign <= "\udfff" for sign in each):
                raise ValueError("holds half a character, which no encoding can write")
            elif isinstance(each, float) and not isfinite(each):
                raise ValueError("holds a number that is not finite")
        if not (level := below):
            return value
    raise ValueError(f"is nested deeper than {_MAX_DEPTH} levels")


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, AfterValidator(_plain)]
"""A name or a path, on one line."""
FileName = Annotated[str, AfterValidator(_plain), AfterValidator(_relative)]
"""Of a file in a folder: relative, with `/`, without `..`."""
StageName = Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Object = Annotated[dict[str, Any], AfterValidator(_finite)]
"""JSON of finite numbers and whole characters."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=True, allow_inf_nan=False)


class DvcVersion(_Form):
    """A version of data that DVC keeps."""

    file: FileName
    """The .dvc file, relative to the repository."""
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}(\\.dir)?$")]
    """DVC's own hash; `.dir` at the end for a folder."""


class SourceEntry(_Form):
    """Something from outside the store: the source model, its tokenizer, a text."""

    name: Text
    """What the stage that reads it calls it."""
    digest: Sha256
    """sha256 of the canonical JSON of `files`."""
    path: Text
    """As the recipe names it: a path, or `organisation/name` on the Hugging Face hub."""
    files: dict[FileName, Sha256]
    """sha256 of every file, by name."""
    revision: Text | None = None
    """For a model of the hub: the commit."""
    dvc: DvcVersion | None = None
    """Where DVC tracks it."""


class InputEntry(_Form):
    """What a stage read."""

    digest: Sha256
    """Content digest: of a source, or of the artifact of another stage."""
    stage: StageName | None = None
    """The other stage; null for a source."""
    key: Sha256 | None
    """Its key; null for a source."""


class Environment(_Form):
    """What a stage ran with."""

    camera: Text
    """Version of this package."""
    commit: Text | None
    """git commit of its code, with `+` if files differed from it; null outside a checkout."""
    python: Text
    machine: Text
    """Kind of processor: `x86_64`, `aarch64`."""
    packages: dict[Text, Text]
    """Versions of what decides numbers."""
    device: Text | None = None
    """Kind of device, where the stage computes on one."""


class StageEntry(_Form):
    """One stage that was performed, and the artifact that came out."""

    step: Text
    """What people call it: `quantize baseline`."""
    stage: StageName
    """The kind of work."""
    version: int
    """Of the meaning of this kind of work."""
    key: Sha256
    """sha256 of the canonical JSON of stage, version, options, facts and the digests of the inputs."""
    digest: Sha256
    """Content digest of the artifact: sha256 of the canonical JSON of the sha256 of all its files, by name."""
    options: Object
    """What was asked for, by section; in version 1 without sections."""
    facts: Object | None = None
    """What else the result depends on, such as the name of the device; part of the key unless it is left out."""
    inputs: dict[Text, InputEntry]
    """By the stage's own names."""
    outcome: dict[Text, float] | None = None
    """What pruning made of a mixture of experts: `experts_kept` in each layer, `kept_width` of each, `removed_share` of
    all their channels."""
    environment: Environment | None = None
    """Left out inside a GGUF, whose bytes do not depend on it."""


class OwnStageEntry(StageEntry):
    """An artifact's own entry in its own lineage, which cannot hold its own digest."""

    digest: Sha256 | None = None  # type: ignore[assignment]  # wider than the parent's on purpose


class Lineage(_Form):
    """What a GGUF or an artifact of the store descends from."""

    version: Literal[1, 2, 3] = Field(alias="schema")
    """Version of this form."""
    sources: dict[Sha256, SourceEntry]
    """By digest."""
    stages: dict[Sha256, StageEntry]
    """By key."""
    artifact: OwnStageEntry | None = None
    """In the store only: the artifact that the file lies in."""


class Publication(Lineage):
    """lineage.json of a published folder: all of a lineage, and what was published."""

    name: Text
    """Of the model."""
    recipe: Object
    """The whole recipe, without its sections `tracking` and `publish`."""
    files: dict[FileName, Sha256]
    """sha256 of every published file but lineage.json, by name."""
    made_of: dict[Sha256, dict[FileName, Sha256]] | None = None
    """By the key of the stage: sha256 of every file of the artifacts whose files were published (`save`, `convert`, `report`),
    so that the digests of these artifacts follow from this document. Since version 3."""
    environment: Environment
    """What the publication was made with."""
    references: dict[Text, Text]
    """Where else the run is recorded: `mlflow_run`, `prefect_run`."""
    digest: Sha256
    """sha256 of the canonical JSON of this document without this field: UTF-8, keys sorted, no white space."""


def check_lineage(value: Any, where: str) -> dict[str, Any]:
    """A lineage that came from elsewhere, once its form is the published one.

    Raises:
        CameraError: naming the first field that is not.
    """
    number = value.get("schema") if isinstance(value, dict) else None
    if isinstance(number, int) and number > PUBLICATION_SCHEMA:
        raise NewerFormError(
            f"{where} is of schema {number}, and this version reads up to {PUBLICATION_SCHEMA}: install a newer one"
        )
    form = Publication if isinstance(value, dict) and "files" in value else Lineage
    try:
        form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = one_line(".".join(map(str, first["loc"]))) or "its content"
        raise CameraError(f"{where} is no lineage of this pipeline: {field}: {first['msg']}") from None
    lineage: dict[str, Any] = value
    return lineage


def read_lineage(path: Path) -> dict[str, Any]:
    """The lineage in a file; whatever reads one that may be of others reads it here.

    Raises:
        CameraError: if the file is missing, a link, or no lineage.
    """
    if (what := kind(path)) not in (None, "a file"):
        raise CameraError(f"{path} is {what}: a lineage is read from a regular file only")
    value = read_json(path)
    try:
        json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CameraError(f"{path} is no lineage of this pipeline: {error}") from None
    return check_lineage(value, str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a field is there twice, and readers differ in which they take")
    return found


def read_publication(folder: Path) -> dict[str, Any]:
    """The lineage of a published folder.

    Raises:
        CameraError: if the folder has none.
    """
    lineage = read_lineage(folder / LINEAGE)
    if "files" not in lineage:
        raise CameraError(f"{folder} is an artifact of the store: give a published folder")
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
    files, beyond = contents(folder)
    for name, what in beyond.items():
        yield f"{folder / name} is {what}, and not part of the publication"
    present = digests(folder, [name for name in files if name != LINEAGE])
    for name in sorted(lineage["files"].keys() | present.keys()):
        if name not in present and name not in beyond:
            yield f"{folder / name} is missing"
        elif name in present and name not in lineage["files"]:
            yield f"{folder / name} is not part of the publication"
        elif name in present and present[name] != lineage["files"][name]:
            yield f"{folder / name} does not have the sha256 in {LINEAGE}"


def json_schema() -> str:
    """JSON Schema 2020-12 of a published folder's lineage.json, as text."""
    schema = Publication.model_json_schema(by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2)


if __name__ == "__main__":
    sys.stdout.write(json_schema() + "\n")
