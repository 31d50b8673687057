"""A published folder: its place, what is wrong with it, and `published.json`, which the store keeps of it."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from camera.errors import CameraError
from camera.files import read_json, write_json
from tasks.contents import kind
from tasks.lineage_form import damages, read_publication
from tasks.signed import records_at
from tasks.store import LINEAGE, Store

RECORD = "published.json"
_A_LINK = "remove the link, or set publish.folder to the folder that it leads to"


class DvcRecord(BaseModel):
    """The DVC version of a published folder."""

    model_config = ConfigDict(frozen=True, strict=True)

    dvc_file: str
    md5: str
    pushed_to: str | None
    push_error: str | None = None


class PublicationRecord(BaseModel):
    """Where a model was published, or why it was not."""

    model_config = ConfigDict(frozen=True, strict=True, use_attribute_docstrings=True)

    name: str
    folder: str | None
    """None if the quality gate withheld it."""
    lineage_digest: str | None = None
    dvc: DvcRecord | None = None
    registry: dict[str, str] | None = None
    """Name, version and alias in MLflow's registry."""
    registry_error: str | None = None
    """Why it is not registered yet."""
    withheld: list[str] | None = None
    """What the quality gate says."""

    @model_validator(mode="after")
    def _what_is_published_has_a_lineage(self) -> Self:
        if self.folder is not None and (self.lineage_digest is None or "\0" in self.folder):
            raise ValueError("a published folder has a digest, and a name that a file can have")
        return self

    @property
    def pending(self) -> bool:
        """Whether a push or the registration is still to be done."""
        return self.registry_error is not None or (self.dvc is not None and self.dvc.push_error is not None)


def write_record(folder: Path, record: PublicationRecord) -> None:
    """Write the record of a publication into its artifact's folder."""
    write_json(folder / RECORD, record.model_dump())


def read_record(folder: Path) -> PublicationRecord:
    """The record in an artifact's folder.

    Raises:
        CameraError: if it is missing or is none.
    """
    value = read_json(folder / RECORD)
    try:
        return PublicationRecord.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        raise CameraError(
            f"{folder / RECORD} is no record of a publication: {field}: {first['msg']}"
        ) from None


def destination(folder: Path | str, name: str) -> Path:
    """Where a model of this name is published."""
    return Path(folder).resolve() / name


def refuse_foreign(target: Path, name: str, store: Store | None = None) -> None:
    """Raise CameraError if the place is taken by something that we did not publish under this name.

    Args:
        target: the place.
        name: of the model.
        store: the project's, which knows what was published there even if that is damaged by now.
    """
    if kind(target) == "a link":
        raise CameraError(f"{target} is a link, and would be replaced: {_A_LINK}")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        lineage = read_json(target / LINEAGE)
    except CameraError:
        lineage = None
    if isinstance(lineage, dict) and lineage.get("name") == name:
        return
    if target.is_dir() and store is not None and any(records_at(store, target)):
        return
    raise CameraError(
        f"{target} exists with other content: move it away, or choose another publish.folder or name"
    )


def damage(folder: Path, lineage_digest: str | None = None) -> str | None:
    """What is wrong with a published folder, in words, or None. Hashes every byte."""
    if kind(folder) == "a link":
        return f"{folder} is a link, and no folder that was published: {_A_LINK}"
    try:
        lineage = read_publication(folder)
        if lineage_digest is not None and lineage["digest"] != lineage_digest:
            return f"{folder / LINEAGE} is of another publication"
        return next(damages(folder, lineage), None)
    except (CameraError, OSError) as error:
        return str(error)
