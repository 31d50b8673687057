"""Publish: one folder with the HF model, the GGUF, the card, the report and the lineage; DVC and the registry.

The folder is made beside its place and renamed into it. The stage holds only as long as the folder does: a
published file that is damaged or gone makes the next run publish again.

A model that fails the quality gate is not published: the artifact then holds the card, marked, and the reasons.
"""

import shutil
import threading
from pathlib import Path
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.digests import digest_files, digest_json, files_below
from camera.disk import explain_disk_errors
from camera.errors import CameraError, NetworkError
from camera.files import move_into_place, read_json, write_json
from camera.locks import output_lock
from camera.options import Options
from camera.report.card import write_card
from camera.report.gate import Gate
from camera.report.schema import read_results
from tasks import registry, versioning
from tasks.estimate import Known, Needs
from tasks.lineage import environment
from tasks.lineage_form import PUBLICATION_SCHEMA, check_lineage, damages, read_publication
from tasks.recipe import PublishOptions
from tasks.signed import record_of, write_record
from tasks.signing import retire_signature
from tasks.stage import Context, Stage, register
from tasks.store import LINEAGE, MANIFEST, Artifact, Store

RECORD = "published.json"
_NOT_PUBLISHED = (MANIFEST, LINEAGE)
_DVC = threading.Lock()
"""DVC's own lock does not wait: members of a sweep that publish at once in threads would fail."""


class PublicationOptions(Options):
    """What is published."""

    name: str
    base_model: str
    recipe: dict[str, Any]
    register_model: bool
    """Whether it becomes a version in MLflow's registry."""


def destination(folder: Path | str, name: str) -> Path:
    """Where a model of this name is published."""
    return Path(folder).resolve() / name


def refuse_foreign(target: Path, name: str) -> None:
    """Raise CameraError if the place is taken by something that we did not publish under this name."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    lineage = read_json(target / LINEAGE) if (target / LINEAGE).is_file() else None
    if isinstance(lineage, dict) and lineage.get("name") == name:
        return
    raise CameraError(
        f"{target} exists with other content: move it away, or choose another publish.folder or name"
    )


def check_place(options: PublishOptions, name: str) -> None:
    """Ask before the work whether a model could be published under this name.

    Raises:
        CameraError: if the place is taken, or DVC could not version it.
    """
    target = destination(options.folder, name)
    refuse_foreign(target, name)
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
    # Locked: another recipe may have the same name.
    with output_lock(target, wait=True), explain_disk_errors(target.parent):
        refuse_foreign(target, name)
        if not _is_published(target, context):
            _place(target, context)
        lineage = read_json(target / LINEAGE)
        _record(target, lineage["digest"], context)
        retire_signature(target, _store_of(context), lineage["digest"])
    record: dict[str, Any] = {
        "name": name,
        "folder": str(target),
        "lineage_digest": lineage["digest"],
        "dvc": None,
        "registry": None,
        "registry_error": None,
    }
    if options.dvc:
        with _DVC:
            version = versioning.add_and_push(target, options.remote)
        record["dvc"] = None if version is None else vars(version)
    if of.register_model and context.references.mlflow_pending is not None:
        record["registry_error"] = context.references.mlflow_pending
    elif of.register_model and context.references.mlflow_run is not None:
        try:
            record["registry"] = registry.register(
                name,
                target,
                lineage,
                record["dvc"],
                options.alias,
                context.references.mlflow_run,
                must_be_signed=options.require_signature,
            )
        except NetworkError as error:  # published all the same; the next run registers it
            record["registry_error"] = str(error)
    write_json(context.out / RECORD, record)
    return {"bytes": sum((target / file).stat().st_size for file in lineage["files"])}


def still_holds(artifact: Artifact) -> bool:
    """Whether the published folder is there, whole, and pushed; where none was to be made, there is nothing to hold."""
    record = read_json(artifact.path / RECORD)
    if record["folder"] is None:
        return True
    pending = record["dvc"] is not None and record["dvc"]["push_error"] is not None
    pending = pending or record.get("registry_error") is not None
    return not pending and damage(Path(record["folder"]), record["lineage_digest"]) is None


def damage(folder: Path, lineage_digest: str | None = None) -> str | None:
    """What is wrong with a published folder, in words, or None. Hashes every byte."""
    try:
        lineage = read_publication(folder)
    except CameraError as error:
        return str(error)
    if lineage_digest is not None and lineage.get("digest") != lineage_digest:
        return f"{folder / LINEAGE} is of another publication"
    return next(damages(folder, lineage), None)


def _withhold(context: Context, gate: Gate) -> dict[str, float]:
    """Keep what a model that may not be published would have said of itself, and why it may not."""
    _write_card(context.out, context.inputs["model"], context)
    name = context.options.of(PublicationOptions).name
    record = {"name": name, "folder": None, "withheld": list(gate.reasons), "dvc": None, "registry": None}
    write_json(context.out / RECORD, record)
    return {"withheld": 1}


def _write_card(folder: Path, source: Path, context: Context) -> None:
    about = context.options.of(PublicationOptions)
    results = read_results(context.inputs["report"] / "results.json")
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
    return damage(target) is None and read_json(target / LINEAGE)["stages"] == context.lineage["stages"]


def _place(target: Path, context: Context) -> None:
    inputs, of = context.inputs, context.options.of(PublicationOptions)
    making = target.with_name(f".{target.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for folder in (inputs["model"], inputs["converted"]):
        for file in files_below(folder):
            if file not in _NOT_PUBLISHED:
                (making / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / file, making / file)
    for file in ("report.html", "results.json"):
        shutil.copyfile(inputs["report"] / file, making / file)
    _write_card(making, making, context)
    runs = {"mlflow_run": context.references.mlflow_run, "prefect_run": context.references.prefect_run}
    manifests = [read_json(inputs[name] / MANIFEST) for name in ("model", "converted", "report")]
    lineage: dict[str, Any] = {
        **context.lineage,
        "schema": PUBLICATION_SCHEMA,
        "name": of.name,
        "recipe": of.recipe,
        "files": digest_files(making, files_below(making)),
        "made_of": {
            manifest["key"]: {name: entry["sha256"] for name, entry in manifest["files"].items()}
            for manifest in manifests
        },
        "environment": environment(None),
        "references": {field: run for field, run in runs.items() if run is not None},
    }
    lineage["digest"] = digest_json(lineage)
    write_json(making / LINEAGE, check_lineage(lineage, str(target / LINEAGE)))
    _record(target, lineage["digest"], context)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    move_into_place(making, target)
    shutil.rmtree(old, ignore_errors=True)


def _store_of(context: Context) -> Store:
    return Store(context.out.parent.parent)


def _record(target: Path, digest: str, context: Context) -> None:
    """Let the store know of a publication, and that it must be signed; what it knows of its signature stays."""
    known = record_of(_store_of(context), digest)
    required = known.required or context.options.of(PublishOptions).require_signature
    made = {"digest": digest, "folder": str(target), "required": required}
    if known.model_dump() != (record := known.model_copy(update=made)).model_dump():
        write_record(_store_of(context), record)


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
