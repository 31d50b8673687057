"""The store's record of every publication: where it was put, whether it must be signed, and by whom it was.

<store>/.published/<lineage digest>.json
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from camera.digests import canonical_json
from camera.errors import CameraError
from camera.escape import one_line
from camera.files import read_json, write_json
from tasks.registry import REQUIRED_TAG, SIGNATURE_TAG, SIGNED_TAG, Version
from tasks.store import Store

_SIGNER = ("key", "principal", "sha256")
"""What the tag SIGNED_TAG holds, as JSON."""


class Record(BaseModel):
    """What is known of a publication and its signature, from the registry or the store."""

    model_config = ConfigDict(frozen=True, strict=True, use_attribute_docstrings=True)

    digest: str = ""
    """Of the lineage; empty where nothing is known."""
    folder: str = ""
    required: bool = False
    """Whether its recipe requires a signature."""
    key: str = ""
    """Fingerprint of the key that signed it: `SHA256:…`; empty if none did."""
    principal: str = ""
    """The signer's name in the list of allowed signers, if there was one."""
    sha256: str = ""
    """Of the signature."""
    signature: str = ""
    """The signature itself."""

    @property
    def signer(self) -> str:
        """Who signed it, for people."""
        return one_line(f"{self.principal} ({self.key})" if self.principal else self.key)

    @property
    def needed(self) -> str:
        """Why the publication must have a signature, in words; nothing if it need not."""
        if self.key:
            return f"it was signed by {self.signer}"
        return "required by its recipe" if self.required else ""

    def tags(self) -> dict[str, str]:
        """The signature as tags of a version in the registry."""
        signer = canonical_json({field: getattr(self, field) for field in _SIGNER})
        return {SIGNATURE_TAG: self.signature, SIGNED_TAG: signer}

    @classmethod
    def of(cls, version: Version) -> Self:
        """What the registry recorded of a version.

        Raises:
            CameraError: if somebody put something else there.
        """
        tags = version.tags
        about = {"digest": version.lineage_digest, "folder": str(version.folder)}
        about |= {"signature": tags.get(SIGNATURE_TAG, "")}
        where = f"{version.label}: the tag {SIGNED_TAG} in MLflow's registry"
        required = tags.get(REQUIRED_TAG, "") == "true"
        try:
            signer = cls.model_validate_json(tags.get(SIGNED_TAG, "{}"))
        except ValidationError:
            raise CameraError(f"{where} cannot be read: sign it again with `camera sign`") from None
        return cls.model_validate(
            {**{field: getattr(signer, field) for field in _SIGNER}, **about, "required": required}
        )


def record_of(store: Store, digest: str | None) -> Record:
    """What the store recorded of a publication; an empty record where it knows none.

    Raises:
        CameraError: if the record is damaged.
    """
    path = None if digest is None else store.publication(digest)
    return Record() if path is None or not path.exists() else _read(path)


def records(store: Store) -> Iterator[Record]:
    """What was ever published; records that are damaged are left out."""
    for path in sorted((store.root / ".published").glob("*.json")):
        try:
            yield _read(path)
        except CameraError:
            continue


def records_at(store: Store, folder: Path) -> Iterator[Record]:
    """What was ever published in a place; records that are damaged are left out."""
    return (record for record in records(store) if Path(record.folder) == folder)


def write_record(store: Store, record: Record) -> None:
    """Record a publication, or its signature."""
    write_json(store.publication(record.digest), record.model_dump())


def _read(path: Path) -> Record:
    value: Any = read_json(path)
    try:
        record = Record.model_validate(value)
    except ValidationError:
        record = Record()
    if record.digest != path.stem:
        raise CameraError(f"{path} is damaged: publish again, or sign again, to write it anew")
    return record
