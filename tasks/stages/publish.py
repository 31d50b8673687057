"""Publish: one folder with the HF model, the GGUF, the card, the report and the lineage; DVC and the registry.

The folder is made beside its place and renamed into it. The stage holds only as long as the folder does: a
published file that is damaged or gone makes the next run publish again.

A model that fails the quality gate is not published: the artifact then holds the card, marked, and the reasons.
"""

import shutil
import threading
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.digests import copy_hashed, digest_file, digest_files, digest_json, files_below
from camera.disk import explain_disk_errors
from camera.errors import CameraError, NetworkError
from camera.files import move_into_place, write_json
from camera.locks import output_lock
from camera.options import Options
from camera.report.card import CARD, write_card
from camera.report.gate import Gate
from camera.report.schema import read_results
from tasks import registry, signed, versioning
from tasks.contents import kind
from tasks.estimate import Known, Needs
from tasks.lineage import environment
from tasks.lineage_form import PUBLICATION_SCHEMA, check_lineage, read_publication
from tasks.publication import (
    DvcRecord,
    PublicationRecord,
    damage,
    destination,
    read_record,
    refuse_foreign,
    write_record,
)
from tasks.recipe import PublishOptions
from tasks.signing import settle_signature
from tasks.stage import Context, Stage, register
from tasks.store import LINEAGE, Artifact, Store

_DVC = threading.Lock()
"""DVC's own lock does not wait: members of a sweep that publish at once in threads would fail."""


class PublicationOptions(Options):
    """What is published."""

    name: str
    base_model: str
    recipe: dict[str, Any]
    register_model: bool
    """Whether it becomes a version in MLflow's registry."""


def check_place(options: PublishOptions, name: str, store: Store | None = None) -> None:
    """Ask before the work whether a model could be published under this name.

    Args:
        options: where to.
        name: of the model.
        store: as for `refuse_foreign`.

    Raises:
        CameraError: if the place is taken, or DVC could not version it.
    """
    target = destination(options.folder, name)
    refuse_foreign(target, name, store)
    if options.dvc:
        with _DVC:
            versioning.refuse_ignored(target)


def run(context: Context) -> dict[str, float]:
    """Write the published folder, version and register it, and record all that in `published.json`.

    Where the gate failed, `published.json` names no folder but the reasons.
    """
    options, of = context.options.of(PublishOptions), context.options.of(PublicationOptions)
    name = of.name
    gate = read_results(context.inputs["report"] / "results.json").gate
    if gate is not None and not gate.passed:
        return _withhold(context, gate)
    target = destination(options.folder, name)
    # Locked until it is versioned and registered: another recipe may have the same name.
    with output_lock(target, wait=True), explain_disk_errors(target.parent):
        refuse_foreign(target, name, _store_of(context))
        if not _is_published(target, context):
            _place(target, context)
        lineage = read_publication(target)
        _record(target, lineage["digest"], context)
        settle_signature(target, _store_of(context), lineage["digest"])
        made = PublicationRecord(name=name, folder=str(target), lineage_digest=lineage["digest"])
        if options.dvc:
            made = made.model_copy(update={"dvc": _versioned(target, lineage, options.remote)})
        if of.register_model:
            made = _registered(made, lineage, context)
    write_record(context.out, made)
    return {"bytes": sum((target / file).stat().st_size for file in lineage["files"])}


def _versioned(target: Path, lineage: dict[str, Any], remote: str | None) -> DvcRecord | None:
    """Version what was published with DVC, whose copy must be of the bytes that the lineage names."""
    with _DVC:
        version = versioning.add_and_push(target, remote)
        if version is None:
            return None
        root = versioning.repository_root(target)
        assert root is not None  # it has a version there
        kept, _ = versioning.stored_digests(root, version.md5, PurePosixPath())
    files = lineage["files"] | {LINEAGE: digest_file(target / LINEAGE)}
    if differ := sorted(name for name in files.keys() | kept.keys() if files.get(name) != kept.get(name)):
        raise CameraError(
            f"DVC's version of {target} is not what was published ({', '.join(differ)}): a file changed meanwhile, or "
            ".dvcignore leaves it out. Mend that and run the recipe again"
        )
    return DvcRecord(**vars(version))


def _registered(made: PublicationRecord, lineage: dict[str, Any], context: Context) -> PublicationRecord:
    options, references = context.options.of(PublishOptions), context.references
    if references.mlflow_pending is not None:
        return made.model_copy(update={"registry_error": references.mlflow_pending})
    if references.mlflow_run is None:
        return made
    target = destination(options.folder, made.name)
    if registry.lineage_digest(target) != made.lineage_digest:
        raise CameraError(f"{target} changed while it was published: run the recipe again")
    dvc = None if made.dvc is None else made.dvc.model_dump()
    try:
        version = registry.register(
            made.name,
            target,
            lineage,
            dvc,
            options.alias,
            references.mlflow_run,
            must_be_signed=options.require_signature,
        )
    except NetworkError as error:  # published all the same; the next run registers it
        return made.model_copy(update={"registry_error": str(error)})
    return made.model_copy(update={"registry": version})


def still_holds(artifact: Artifact) -> bool:
    """Whether the published folder is there, whole, and pushed; where none was to be made, there is nothing to hold."""
    try:
        record = read_record(artifact.path)
    except CameraError:
        return False
    if record.folder is None:
        return True
    return not record.pending and damage(Path(record.folder), record.lineage_digest) is None


def _withhold(context: Context, gate: Gate) -> dict[str, float]:
    """Keep what a model that may not be published would have said of itself, and why it may not."""
    _write_card(context.out, context.inputs["model"], context.inputs["report"], context)
    name = context.options.of(PublicationOptions).name
    write_record(context.out, PublicationRecord(name=name, folder=None, withheld=list(gate.reasons)))
    return {"withheld": 1}


def _write_card(folder: Path, source: Path, report: Path, context: Context) -> None:
    about = context.options.of(PublicationOptions)
    results = read_results(report / "results.json")
    pruned, checkpoint = context.inputs["pruned"], Checkpoint.open(source)
    write_card(
        folder,
        checkpoint,
        pruned,
        base_model=about.base_model,
        results=results,
        name=about.name,
        lineage=True,
    )


def _is_published(target: Path, context: Context) -> bool:
    """Whether the folder already is this publication, as when only the push was still to be done."""
    if damage(target) is not None:
        return False
    return bool(read_publication(target)["stages"] == context.lineage["stages"])


def _place(target: Path, context: Context) -> None:
    inputs, of = context.inputs, context.options.of(PublicationOptions)
    making = target.with_name(f".{target.name}.making")
    _clear(making)
    making.mkdir(parents=True)
    copied: dict[str, str] = {}
    made_of: dict[str, dict[str, str]] = {}
    for given, only in (("model", None), ("converted", None), ("report", ("report.html", "results.json"))):
        artifact = _read_by_the_run(inputs[given], context)
        made_of[artifact.key] = artifact.sha256
        copied |= _copied(artifact, making, only or artifact.sha256)
    _write_card(making, making, making, context)
    files = digest_files(making, files_below(making))
    if any(files[name] != sha256 for name, sha256 in copied.items() if name != CARD):
        raise CameraError(f"{making} changed while it was written: run the recipe again")
    runs = {"mlflow_run": context.references.mlflow_run, "prefect_run": context.references.prefect_run}
    lineage: dict[str, Any] = {
        **context.lineage,
        "schema": PUBLICATION_SCHEMA,
        "name": of.name,
        "recipe": of.recipe,
        "files": files,
        "made_of": made_of,
        "environment": environment(None),
        "references": {field: run for field, run in runs.items() if run is not None},
    }
    lineage["digest"] = digest_json(lineage)
    write_json(making / LINEAGE, check_lineage(lineage, str(target / LINEAGE)))
    _record(target, lineage["digest"], context)
    old = target.with_name(f".{target.name}.old")
    _clear(old)
    if target.exists():
        target.rename(old)
    move_into_place(making, target)
    _clear(old)


def _clear(place: Path) -> None:
    """Remove what lies there; of a link the link alone."""
    if kind(place) in (None, "a folder"):
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink()


def _store_of(context: Context) -> Store:
    return Store(context.out.parent.parent)


def _record(target: Path, digest: str, context: Context) -> None:
    """Let the store know of a publication, and that it must be signed; what it knows of its signature stays."""
    known = signed.record_of(_store_of(context), digest)
    required = known.required or context.options.of(PublishOptions).require_signature
    made = {"digest": digest, "folder": str(target), "required": required}
    if known.model_dump() != (record := known.model_copy(update=made)).model_dump():
        signed.write_record(_store_of(context), record)


def _read_by_the_run(path: Path, context: Context) -> Artifact:
    """The artifact of the store that the run named as an input.

    Raises:
        CameraError: if another lies there by now.
    """
    artifact = _store_of(context).peek(path.parent.name, path.name)
    named = context.lineage["stages"].get(path.name, {}).get("digest")
    if artifact is None or artifact.digest != named or digest_json(artifact.sha256) != named:
        raise CameraError(f"{path} is not the artifact that this run made: run the recipe again")
    return artifact


def _copied(artifact: Artifact, target: Path, names: Iterable[str]) -> dict[str, str]:
    """Copy files of an artifact, and hold every byte that is copied to its manifest; their sha256."""
    expected = artifact.sha256
    done: dict[str, str] = {}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        done[name] = copy_hashed(artifact.path / name, target / name)
        if done[name] != expected.get(name):
            raise CameraError(
                f"{artifact.path / name} changed while it was published, and nothing was: run the recipe again"
            )
    return done


def needs(known: Known) -> Needs:
    """A copy of the model and of its GGUF, outside the store."""
    return Needs(disk=known.size("model") + known.size("converted"), in_store=False)


STAGE = register(
    Stage(
        "publish",
        3,
        run,
        {"publish": PublishOptions, "publication": PublicationOptions},
        needs,
        intermediate=False,
        still_holds=still_holds,
    )
)
