"""Published models, found by what people call them: a path, a name, `name@3`, `name@production`; or all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from camera.errors import CameraError
from tasks import registry
from tasks.audit import Finding, audit
from tasks.audit.finding import unverifiable
from tasks.publication import RECORD, read_record
from tasks.registry import Version
from tasks.store import LINEAGE, Store


@dataclass(frozen=True)
class Found:
    """A published model whose files are at hand."""

    label: str
    path: Path
    version: Version | None = None

    @property
    def restored(self) -> str | None:
        """The DVC version whose copy this is, if a later publication took the folder."""
        copied = self.version is not None and self.version.folder != self.path
        return self.version.dvc_md5 if self.version is not None and copied else None


@contextmanager
def located(reference: str) -> Iterator[Found]:
    """What a reference names; a version whose folder was published over is a copy for as long as the block lasts.

    Raises:
        CameraError: if it is no path here and nothing in the registry, or its files are nowhere.
    """
    if Path(reference).exists():
        yield Found(reference, Path(reference))
        return
    if "/" in reference or reference.endswith(".gguf"):
        raise CameraError(
            f"{reference} does not exist: give a published folder, a GGUF file, an artifact or a name"
        )
    version = registry.find_version(reference)
    with registry.files_of(version) as folder:
        yield Found(version.label, folder, version)


def audit_all(folder: Path, store: Store, auditing: Callable[[Found], Finding]) -> Iterator[Finding]:
    """Audit every published model: below a folder, recorded in the store, and every version in the registry.

    Raises:
        NetworkError: if MLflow cannot be reached: then what is published is not known.
    """
    seen: set[Path] = set()
    for version in registry.versions():
        try:
            with registry.files_of(version) as place:
                found = auditing(Found(version.label, place, version))
                seen.add(version.folder.resolve())
        except CameraError as error:
            found = unverifiable(
                version.label, str(error), "superseded" if version.folder.exists() else "absent"
            )
        found.name = f"{version.label} {version.folder}"
        yield found
    for place in sorted({*_below(folder), *_recorded(store)} - seen):
        yield auditing(Found(place.name, place))


def _below(folder: Path) -> Iterator[Path]:
    for lineage in folder.glob(f"*/{LINEAGE}"):
        if not lineage.parent.name.startswith("."):
            yield lineage.parent.resolve()


def _recorded(store: Store) -> Iterator[Path]:
    for path in store.root.glob(f"publish/*/{RECORD}"):
        try:
            place = read_record(path.parent).folder
        except CameraError:
            continue  # the store's own damage; what it published lies below the folder, or is in the registry
        if place is not None and Path(place).is_dir():
            yield Path(place).resolve()


def audit_found(
    found: Found, store: Store, *, from_remote: bool, signers: Path | None, signed: bool
) -> Finding:
    """Audit one; of a copy that DVC gave, the DVC version is the one that it was made of."""
    return audit(
        found.path,
        store,
        from_remote=from_remote,
        signers=signers,
        require_signature=signed,
        restored=found.restored,
    )
