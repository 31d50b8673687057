"""Published models, found by what people call them: a path, a name, `name@3`, `name@production`; or all of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from camera.errors import CameraError, NetworkError
from tasks import registry
from tasks.audit import Finding, audit
from tasks.audit.finding import heading, unverifiable, verified, wrong
from tasks.audit.records import published_places
from tasks.contents import kind, place
from tasks.lineage_form import read_publication
from tasks.registry import Version
from tasks.store import LINEAGE, Store

_MODEL_FILES = ("*.gguf", "*.safetensors", "config.json")


@dataclass(frozen=True)
class Found:
    """A published model whose files are at hand."""

    label: str
    path: Path
    version: Version | None = None

    @property
    def copy_of(self) -> Version | None:
        """The version, if its files are a copy from DVC and not those in the folder that people use."""
        copied = self.version is not None and self.version.folder != self.path
        return self.version if copied else None


@contextmanager
def located(reference: str, store: Store | None = None) -> Iterator[Found]:
    """What a reference names; a version whose folder was published over is a copy for as long as the block lasts.

    Raises:
        CameraError: if it is no path here and nothing in the registry, or its files are nowhere.
    """
    path = Path(reference)
    if kind(path) is not None:
        yield Found(reference, path)
        return
    if "/" in reference or reference.endswith(".gguf"):
        raise CameraError(
            f"{reference} does not exist: give a published folder, a GGUF file, an artifact or a name"
        )
    version = registry.find_version(reference)
    with registry.files_of(version, store) as folder:
        yield Found(version.label, folder, version)


def audit_named(reference: str, store: Store, auditing: Callable[[Found], Finding]) -> Finding:
    """Audit what a reference names: a path, or a version in the registry.

    Raises:
        CameraError: if it is no path here and nothing in the registry, or there is no lineage to follow.
    """
    if kind(Path(reference)) is not None or "/" in reference or reference.endswith(".gguf"):
        with located(reference, store) as found:
            return auditing(found)
    return audit_version(registry.find_version(reference), store, auditing)


def audit_version(version: Version, store: Store, auditing: Callable[[Found], Finding]) -> Finding:
    """Audit the folder of a version in the registry, or where a later publication took it, DVC's copy.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    folder = version.folder
    title, name = f"{version.label} {folder}", "published folder"
    gone = kind(folder) is None
    if not gone and (what := kind(folder)) != "a folder":
        return heading(title, [wrong(name, f"{folder} is {what}")])
    superseded = registry.is_superseded(version, store)
    if superseded and version.dvc_md5 is None:
        if gone:
            found = unverifiable(name, f"{folder} is gone, and it was not versioned with DVC", "absent")
        else:
            found = unverifiable(
                name, f"{folder} holds a later publication, and DVC has no copy of this", "superseded"
            )
        return heading(title, [found])
    try:
        with registry.files_of(version, store) as files:
            found = auditing(Found(version.label, files, version))
    except NetworkError:
        raise
    except (CameraError, OSError) as error:
        if superseded:  # and DVC does not give its copy
            return heading(title, [unverifiable(name, str(error), "absent" if gone else "superseded")])
        return heading(title, [wrong(name, str(error))])
    found.name = title
    if superseded:
        copy = f"DVC's copy of {version.dvc_md5} was read"
        if gone:
            found.add(unverifiable(name, f"{folder} is not here; {copy}", "absent"))
        else:
            found.add(verified(name, f"{folder} holds a later publication; {copy}"))
    return found


def audit_all(folder: Path, store: Store, auditing: Callable[[Found], Finding]) -> Iterator[Finding]:
    """Audit every published model: below a folder, recorded in the store, and every version in the registry.

    What cannot be audited is a finding like others, so that the rest is audited all the same.

    Raises:
        NetworkError: if MLflow cannot be reached: then what is published is not known.
    """
    seen: set[Path] = set()
    for version in registry.versions():
        yield audit_version(version, store, auditing)
        if kind(version.folder) is not None and not registry.is_superseded(version, store):
            seen.add(place(version.folder))
    recorded = {place(Path(at)) for _, at in published_places(store) if kind(Path(at)) is not None}
    for at in sorted({*_below(folder), *recorded} - seen):
        try:
            if kind(at / LINEAGE) is None and at not in recorded:
                found = unverifiable(str(at), f"has no {LINEAGE}: nothing says what made it", "untracked")
            else:
                found = auditing(Found(at.name, at))
        except NetworkError:
            raise
        except (CameraError, OSError) as error:
            found = wrong(str(at), str(error))
        yield found


def _below(folder: Path) -> Iterator[Path]:
    """The folders below one that have a lineage, or files of a model."""
    for at in sorted(folder.iterdir()) if folder.is_dir() else ():
        if at.name.startswith(".") or not os.path.isdir(at):
            continue
        try:
            if kind(at / LINEAGE) is not None or any(any(at.glob(pattern)) for pattern in _MODEL_FILES):
                yield place(at)
        except OSError:
            yield place(at)


def audit_found(
    found: Found,
    store: Store,
    *,
    from_remote: bool,
    signers: Path | None,
    signed: bool,
    everywhere: bool = False,
) -> Finding:
    """Audit one; where it is a version in the registry, its folder must hold that version.

    Raises:
        CameraError: if there is no lineage to follow.
    """
    version = found.version
    finding = audit(
        found.path,
        store,
        from_remote=from_remote,
        signers=signers,
        require_signature=signed,
        copy_of=found.copy_of,
        everywhere=everywhere,
    )
    if version is not None and read_publication(found.path)["digest"] != version.lineage_digest:
        another = (
            f"{found.path} does not hold what the registry calls {version.label}: its lineage is another"
        )
        finding.add(wrong("published folder", another))
    return finding
