"""The registry of published models: a version for each publication, tagged with its digests; and where its files are."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from camera.digests import canonical_json
from camera.errors import CameraError
from camera.files import read_json
from tasks import versioning
from tasks.contents import kind
from tasks.lineage_form import own_digest_holds, read_publication
from tasks.mlflow_client import QUOTED, database_of, existing_registry, mlflow_client, pages, tracking_uri
from tasks.store import Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

LINEAGE_TAG = "camera.lineage_digest"
DOCUMENT_TAG = "camera.lineage"
"""On a registry version: the whole lineage.json, as canonical JSON; left out if it is longer than MLflow takes."""
FOLDER_TAG = "camera.folder"
DVC_TAG = "dvc.md5"
SHA256_TAG = "sha256."
"""Before the name of a GGUF file."""
SIGNED_TAG = "camera.signed_by"
"""Of a signed version: JSON of the key's fingerprint, its name if the list of signers has one, sha256 of the signature."""
SIGNATURE_TAG = "camera.signature"
"""The signature itself, for when a later version lies in the folder."""
REQUIRED_TAG = "camera.signature_required"
"""Whether the recipe requires a signature: `true`."""
PRODUCTION = "production"
"""The alias that only `camera promote` gives."""
_TAG_LENGTH = 100_000


@dataclass(frozen=True)
class Version:
    """One published model in the registry."""

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str | None
    created: datetime
    tags: dict[str, str]

    @property
    def label(self) -> str:
        """`tiny@3`: how commands are given it."""
        return f"{self.name}@{self.number}"

    @property
    def folder(self) -> Path:
        """Where it was published. A later version of the name may lie there now."""
        return Path(self.tags.get(FOLDER_TAG, ""))

    @property
    def lineage_digest(self) -> str:
        return self.tags.get(LINEAGE_TAG, "")

    @property
    def dvc_md5(self) -> str | None:
        return self.tags.get(DVC_TAG)

    @property
    def gguf_digests(self) -> dict[str, str]:
        """sha256 of the GGUF files, by name."""
        tags = self.tags.items()
        return {tag.removeprefix(SHA256_TAG): value for tag, value in tags if tag.startswith(SHA256_TAG)}

    @property
    def lineage(self) -> dict[str, Any] | None:
        """The whole lineage.json, if it was short enough for the registry.

        Raises:
            CameraError: if somebody put something else there.
        """
        if DOCUMENT_TAG not in self.tags:
            return None
        try:
            found = json.loads(self.tags[DOCUMENT_TAG])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CameraError(f"{self.label}: the tag {DOCUMENT_TAG} in MLflow's registry holds no lineage")
        return found


def register(
    name: str,
    folder: Path,
    lineage: Mapping[str, Any],
    dvc: Mapping[str, Any] | None,
    alias: str,
    run_id: str,
    *,
    must_be_signed: bool = False,
) -> dict[str, str]:
    """Make a registry version of a published folder (or find the one it has) and point the alias to it.

    The registry accepts any source without looking; call this for verified folders only.

    Returns:
        name, version and alias.

    Raises:
        CameraError: if the alias is `production`, which only `camera promote` gives, or MLflow refuses the name.
        NetworkError: if the registry cannot be used.
    """
    from mlflow.exceptions import MlflowException

    if alias == PRODUCTION:
        raise CameraError(
            f"publish.alias: {PRODUCTION} is given by `camera promote {name}`, after an audit; choose another"
        )
    with existing_registry() as client:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise CameraError(f"MLflow refuses the model name {name}: {error}") from None
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        here = [entry for entry in _entries(client, name) if entry.tags.get(FOLDER_TAG) == str(folder)]
        newest = max(here, key=lambda entry: int(entry.version), default=None)
        # One that was published over is a new version where it is published again: the newest says what lies there.
        same = newest if newest is not None and newest.tags.get(LINEAGE_TAG) == lineage["digest"] else None
        tags = {LINEAGE_TAG: lineage["digest"], FOLDER_TAG: str(folder)}
        if len(document := canonical_json(lineage)) <= _TAG_LENGTH:
            tags[DOCUMENT_TAG] = document
        if dvc is not None:
            tags |= {"dvc.file": dvc["dvc_file"], DVC_TAG: dvc["md5"]}
        for file, sha256 in lineage["files"].items():
            if file.endswith(".gguf"):
                tags[SHA256_TAG + file] = sha256
        # A server refuses folders that it does not manage; the folder is in a tag in either case.
        source = f"runs:/{run_id}" if database_of(tracking_uri()) is None else folder.as_uri()
        if must_be_signed:
            tags[REQUIRED_TAG] = "true"
        version = same or client.create_model_version(name, source, run_id, tags=tags)
        if same and must_be_signed:
            client.set_model_version_tag(name, version.version, REQUIRED_TAG, "true")
        client.set_registered_model_alias(name, alias, version.version)
    return {"name": name, "version": str(version.version), "alias": alias}


def versions(name: str | None = None) -> list[Version]:
    """All published models of a name, or of all names, newest first.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    with mlflow_client() as client:
        if client is None:
            return []
        ours = [entry for entry in _entries(client, name) if LINEAGE_TAG in entry.tags]
        found = models(client, name) if ours else []
    aliases = {str(model.name): dict(model.aliases) for model in found}
    entries = [_version(entry, aliases.get(str(entry.name), {})) for entry in ours]
    return sorted(entries, key=lambda version: (version.created, version.number), reverse=True)


def versions_of(lineage_digest: str) -> list[Version]:
    """The versions, of whatever name, that were made of one publication; without aliases.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    with mlflow_client() as client:
        if client is None:
            return []
        asked = f"tags.`{LINEAGE_TAG}` = '{lineage_digest}'"
        return [_version(entry, {}) for entry in pages(client.search_model_versions, filter_string=asked)]


def set_tags(version: Version, tags: Mapping[str, str]) -> None:
    """Record something of a version.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    with existing_registry() as client:
        for tag, value in tags.items():
            client.set_model_version_tag(version.name, str(version.number), tag, value)


def find_version(reference: str) -> Version:
    """A published model by name (the newest version), `name@3` or `name@alias`.

    Raises:
        CameraError: if the registry has no such version, naming those that it has.
        NetworkError: if MLflow cannot be reached.
    """
    name, _, wanted = reference.partition("@")
    known = versions(name)
    if not known:
        raise CameraError(
            f"{reference} is no path here, and the registry has no model {name}: see `camera runs`"
        )
    for version in known:
        if not wanted or wanted == str(version.number) or wanted in version.aliases:
            return version
    has = ", ".join(" = ".join([version.label, *version.aliases]) for version in known)
    raise CameraError(f"{reference}: the registry has {has}")


@contextmanager
def files_of(version: Version, store: Store | None = None) -> Iterator[Path]:
    """The published folder of a version; if a later one took it, a copy from DVC for as long as the block lasts.

    A folder whose content is damaged or unknown is given as it is, for that is what people use.

    Args:
        version: of the registry.
        store: the project's, which knows of publications that are not registered yet.

    Raises:
        CameraError: if neither the folder nor DVC has this version's files.
    """
    if version.dvc_md5 is None or not is_superseded(version, store):
        if (there := kind(version.folder)) != "a folder":
            lacking = there or "gone, and it was not versioned with DVC"
            raise CameraError(f"{version.label}: {version.folder} is {lacking}: run its recipe again")
        yield version.folder
        return
    with TemporaryDirectory(prefix="camera-", dir=versioning.room(version.folder)) as temporary:
        folder = Path(temporary) / version.folder.name
        try:
            versioning.restore(version.folder, version.dvc_md5, folder)
        except CameraError as error:
            there = "another version of it" if kind(version.folder) == "a folder" else "nothing"
            raise CameraError(f"{version.label}: {version.folder} holds {there}, and {error}") from None
        yield folder


def is_superseded(version: Version, store: Store | None) -> bool:
    """Whether a later publication took the folder of a version; not where what lies there is damaged or unknown."""
    there = lineage_digest(version.folder)
    if there == version.lineage_digest:
        return False
    if kind(version.folder) is None:
        return True
    here = [entry for entry in versions(version.name) if entry.folder == version.folder]
    if any(entry.number > version.number for entry in here):
        return True
    # Published here while MLflow was away, and not registered yet.
    registered = any(entry.lineage_digest == there for entry in here)
    if there is None or registered or store is None or not store.publication(there).exists():
        return False
    try:
        return bool(read_json(store.publication(there))["folder"] == str(version.folder))
    except (CameraError, LookupError, TypeError):
        return False


def lineage_digest(folder: Path) -> str | None:
    """The digest of the lineage that lies in a folder, computed anew; None if it has none, or names another."""
    try:
        lineage = read_publication(folder)
    except CameraError:
        return None
    return str(lineage["digest"]) if own_digest_holds(lineage) else None


def _entries(client: "MlflowClient", name: str | None) -> "list[ModelVersion]":
    """All versions in the registry, or those of one name."""
    found = pages(client.search_model_versions, filter_string=_named(name))
    return [entry for entry in found if name in (None, entry.name)]


def models(client: "MlflowClient", name: str | None) -> "list[RegisteredModel]":
    """All models in the registry, or the one of a name."""
    found = pages(client.search_registered_models, filter_string=_named(name))
    return [model for model in found if name in (None, model.name)]


def _named(name: str | None) -> str | None:
    """A condition for MLflow's search; none where its language might read the name as something else."""
    return None if name is None or QUOTED.search(name) else f"name = '{name}'"


def _version(entry: "ModelVersion", aliases: dict[str, str]) -> Version:
    number = int(entry.version)
    return Version(
        name=str(entry.name),
        number=number,
        aliases=tuple(sorted(alias for alias, held in aliases.items() if int(held) == number)),
        run_id=entry.run_id or None,
        created=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC),
        tags=dict(entry.tags),
    )
