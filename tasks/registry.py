"""The registry of published models, read, and the alias `production`: who holds it, who held it before.

MLflow's registry takes any source without looking. So the alias goes only to a version whose files were audited a
moment ago, and the order of its holders is kept in a tag of the registered model.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import read_json
from camera.report.schema import read_results
from tasks import versioning
from tasks.runs import reading
from tasks.store import LINEAGE
from tasks.tracking import DOCUMENT_TAG, DVC_TAG, FOLDER_TAG, LINEAGE_TAG, PRODUCTION, SHA256_TAG

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

_HISTORY = "camera.history."
_REMEMBERED = 100


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
        """The whole lineage.json, if it was short enough for the registry."""
        document: dict[str, Any] | None = (
            json.loads(self.tags[DOCUMENT_TAG]) if DOCUMENT_TAG in self.tags else None
        )
        return document


@dataclass(frozen=True)
class Holder:
    """One change of an alias."""

    version: int
    at: str
    how: str
    """`promote` or `rollback`."""


def versions(name: str | None = None) -> list[Version]:
    """All published models of a name, or of all names, newest first.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    with reading() as client:
        if client is None:
            return []
        found: list[Version] = []
        for model in client.search_registered_models():
            if name is not None and model.name != name:
                continue
            aliases = dict(model.aliases)
            for entry in client.search_model_versions(f"name = '{model.name}'"):
                if LINEAGE_TAG in entry.tags:
                    found.append(_version(entry, aliases))
        return sorted(found, key=lambda version: (version.created, version.number), reverse=True)


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
def files_of(version: Version) -> Iterator[Path]:
    """The published folder of a version; if a later one lies there now, a copy from DVC for as long as the block lasts.

    Raises:
        CameraError: if neither the folder nor DVC has this version's files.
    """
    if _lineage_digest(version.folder) == version.lineage_digest or version.dvc_md5 is None:
        if not version.folder.is_dir():
            raise CameraError(f"{version.label}: {version.folder} is gone, and it was not versioned with DVC")
        yield version.folder
        return
    with TemporaryDirectory(prefix="camera-") as temporary:
        folder = Path(temporary) / version.folder.name
        try:
            versioning.restore(version.folder, version.dvc_md5, folder)
        except CameraError as error:
            there = "another version of it" if version.folder.is_dir() else "nothing"
            raise CameraError(f"{version.label}: {version.folder} holds {there}, and {error}") from None
        yield folder


def promote(
    version: Version, audited: Callable[[Path], list[str]], alias: str = PRODUCTION, how: str = "promote"
) -> str:
    """Give a version an alias, once its files are right and good enough.

    Args:
        version: what to promote.
        audited: audits a published folder; what is wrong, in words.
        alias: usually `production`.
        how: for the history.

    Returns:
        What the quality gate said, in words.

    Raises:
        CameraError: if the audit or the quality gate fails; the alias stays where it was.
        NetworkError: if MLflow cannot be reached.
    """
    with files_of(version) as folder:
        if _lineage_digest(folder) != version.lineage_digest:
            raise CameraError(f"{version.label} cannot be {alias}: {folder} holds another publication")
        if found := audited(folder):
            lines = "".join(f"\n  {line}" for line in found)
            raise CameraError(f"{version.label} cannot be {alias}: its audit fails{lines}")
        gate = read_results(folder / "results.json").gate
    if gate is not None and not gate.passed:
        lines = "".join(f"\n  {reason}" for reason in gate.reasons)
        raise CameraError(f"{version.label} cannot be {alias}: it fails the quality gate{lines}")
    with reading() as client:
        assert client is not None  # the version came from it
        if alias not in version.aliases:
            client.set_registered_model_alias(version.name, alias, str(version.number))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            _remember(client, version.name, alias, Holder(version.number, now, how))
    return "no quality gate in its recipe" if gate is None else "the quality gate passed"


def previous_holder(name: str, alias: str = PRODUCTION) -> Version:
    """The version that had an alias before the one that has it now.

    Raises:
        CameraError: if there is none.
        NetworkError: if MLflow cannot be reached.
    """
    stack: list[int] = []
    for holder in history(name, alias):
        if holder.how == "rollback" and stack:
            stack.pop()
        if not stack or stack[-1] != holder.version:
            stack.append(holder.version)
    known = {version.number: version for version in versions(name)}
    for number in reversed(stack[:-1]):
        if number in known:
            return known[number]
    raise CameraError(f"{name}: nothing had the alias {alias} before; see `camera show {name}`")


def history(name: str, alias: str = PRODUCTION) -> list[Holder]:
    """Who was given an alias, oldest first.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with reading() as client:
        if client is None:
            return []
        try:
            return _history(client, name, alias)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise


def _history(client: "MlflowClient", name: str, alias: str) -> list[Holder]:
    text = client.get_registered_model(name).tags.get(_HISTORY + alias, "[]")
    return [Holder(**entry) for entry in json.loads(text)]


def _remember(client: "MlflowClient", name: str, alias: str, holder: Holder) -> None:
    holders = [*_history(client, name, alias), holder][-_REMEMBERED:]
    client.set_registered_model_tag(name, _HISTORY + alias, json.dumps([vars(entry) for entry in holders]))


def _lineage_digest(folder: Path) -> str | None:
    """The digest of the lineage that lies in a folder, computed and not believed; None if there is none."""
    try:
        lineage = read_json(folder / LINEAGE)
        return digest_json({name: value for name, value in lineage.items() if name != "digest"})
    except (CameraError, AttributeError):
        return None


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
