"""Where this project published a folder, nothing but that publication is right: no link, no artifact, no other model."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_file
from camera.files import read_json
from tasks import registry
from tasks.audit import audit
from tasks.audit import records as audit_records
from tasks.audit.finding import Verdict, verified
from tasks.lineage_form import read_publication
from tasks.mlflow_client import connect
from tasks.published import Found, audit_all, audit_found, audit_version
from tasks.store import Artifact, Store, _checksum
from tests.tasks.publications import Publication


def all_of(made: Publication) -> dict[str, Verdict]:
    def auditing(found: Found) -> Any:
        return audit_found(found, made.store, from_remote=False, signers=None, signed=False)

    found = audit_all(made.root / "published", made.store, auditing)
    return {Path(finding.name).name: finding.overall for finding in found}


def artifact(made: Publication, stage: str) -> Artifact:
    return next(made.store.all(stage))


def writable_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    return target


def through_another_link(folder: Path, target: Path) -> None:
    folder.with_name(".way").symlink_to(target)
    folder.symlink_to(".way")


LINKS: dict[str, Callable[[Publication], Any]] = {
    "another publication": lambda made: made.folder.symlink_to("other"),
    "a link to another": lambda made: through_another_link(made.folder, made.other),
    "an artifact of the store": lambda made: made.folder.symlink_to(artifact(made, "save").path),
    "itself, moved": lambda made: made.folder.symlink_to(made.root / "kept" / "tiny"),
    "nothing": lambda made: made.folder.symlink_to("nowhere"),
    "itself": lambda made: made.folder.symlink_to("tiny"),
    "a name too long": lambda made: made.folder.symlink_to("a" * 300),
}


@pytest.mark.parametrize("to", LINKS)
def test_a_link_in_the_place_of_a_publication_is_wrong(tiny: Publication, to: str) -> None:
    shutil.rmtree(tiny.folder)
    LINKS[to](tiny)
    try:
        assert [part.name for part in audit(tiny.folder, tiny.store).all_of("wrong")] == ["published folder"]
        assert all_of(tiny) == {"other": "verified", "tiny": "wrong"}
        for gguf in tiny.folder.glob("*.gguf") if os.path.isdir(tiny.folder) else ():
            assert audit(gguf, tiny.store).overall == "wrong"
        latest = tiny.root / "latest"
        latest.symlink_to(tiny.folder)
        assert audit(latest, tiny.store).overall == "wrong", "a link that leads over the place"
    finally:
        tiny.folder.unlink()
        (tiny.root / "latest").unlink(missing_ok=True)
        tiny.folder.with_name(".way").unlink(missing_ok=True)
        tiny.folder.mkdir()


def test_a_link_elsewhere_to_a_publication_and_a_project_behind_a_link_are_honest(
    tiny: Publication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to(tiny.folder)
    (tmp_path / "project").symlink_to(tiny.root)
    behind = tmp_path / "project" / "published" / "tiny"
    assert audit(tmp_path / "latest", tiny.store).overall == "verified"
    assert audit(behind, tiny.store).overall == "verified"
    assert audit(next(behind.glob("*.gguf")), tiny.store).overall == "verified"
    monkeypatch.chdir(tmp_path / "project")
    assert audit(Path("published/tiny"), tiny.store).overall == "verified"
    monkeypatch.chdir(behind)
    assert audit(Path(), tiny.store).overall == "verified"


@pytest.mark.parametrize("stage", ["save", "convert"])
def test_an_artifact_in_the_place_of_a_publication_is_wrong(tiny: Publication, stage: str) -> None:
    shutil.rmtree(tiny.folder)
    writable_copy(artifact(tiny, stage).path, tiny.folder)
    assert audit(tiny.folder, tiny.store).overall == "wrong"
    assert all_of(tiny) == {"other": "verified", "tiny": "wrong"}


def test_a_gguf_that_is_left_alone_there_is_wrong(tiny: Publication) -> None:
    [gguf] = tiny.folder.glob("*.gguf")
    [another] = tiny.other.glob("*.gguf")
    (tiny.folder / "lineage.json").unlink()
    shutil.copyfile(another, gguf)
    assert audit(gguf, tiny.store).overall == "wrong"


def test_a_copied_artifact_is_verified_with_the_stores_own_manifest_alone(
    tiny: Publication, tmp_path: Path
) -> None:
    copy = writable_copy(artifact(tiny, "save").path, tmp_path / "copy")
    assert audit(copy, tiny.store).overall == "verified"
    lineage, manifest = read_json(copy / "lineage.json"), read_json(copy / "manifest.json")
    lineage["artifact"]["environment"]["commit"] = "0" * 40
    lineage["artifact"]["step"] = "certified"
    (copy / "lineage.json").write_text(json.dumps(lineage))
    manifest["lineage_sha256"] = digest_file(copy / "lineage.json")
    manifest["metrics"] = {"perplexity": 1.0}
    (copy / "manifest.json").write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    found = audit(copy, tiny.store)
    assert found.overall == "consistent"
    assert "not the one that this store wrote" in found.parts[0].detail


def test_a_record_whose_digest_only_begins_alike_vouches_for_nothing(
    tiny: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = read_publication(tiny.folder)
    alike = lineage["digest"][:12] + "0" * 52
    monkeypatch.setattr(audit_records, "published_places", lambda store: [(alike, str(tiny.folder))])
    assert audit_records.publication(tiny.folder, lineage, tiny.store, None).verdict == "wrong"


@contextmanager
def registered(made: Publication, name: str, folder: str) -> Iterator[registry.Version]:
    """A version in the registry for as long as the block lasts, of the publication `tiny`, that names a folder."""
    client = connect()
    run = client.create_run("0").info.run_id
    dvc = {"dvc_file": "published/tiny.dvc", "md5": "0" * 32 + ".dir"}
    registry.register(name, made.folder, made.lineage(), dvc, "candidate", run)
    try:
        registry.set_tags(registry.find_version(name), {registry.FOLDER_TAG: folder})
        yield registry.find_version(name)
    finally:
        client.delete_registered_model(name)


def test_another_publication_is_wrong_here_though_the_registry_knows_it_elsewhere(
    tiny: Publication, database: str, tmp_path: Path
) -> None:
    other = read_publication(tiny.other)
    known = verified("MLflow registry", "version 1")
    with registered(tiny, "elsewhere", str(tiny.other)) as version:
        registry.set_tags(version, {registry.LINEAGE_TAG: other["digest"]})
        assert audit_records.publication(tiny.folder, other, tiny.store, known).verdict == "wrong"
        registry.set_tags(
            version, {registry.FOLDER_TAG: str(tiny.folder)}
        )  # published here from another store
        assert audit_records.publication(tiny.folder, other, tiny.store, known).verdict == "verified"


@pytest.mark.parametrize("tag", ["a" * 5000, "a/" * 3000, "nul\0", ""])
def test_a_folder_that_cannot_be_in_the_registry_is_a_line(
    tiny: Publication, database: str, tag: str
) -> None:
    with registered(tiny, "odd", f"/{tag}") as version:
        found = audit_version(version, tiny.store, lambda found: audit(found.path, tiny.store))
        assert found.overall == "wrong"
        assert {"other", "tiny"} <= all_of(tiny).keys()


def test_a_link_is_no_version_that_is_gone(tiny: Publication, database: str, tmp_path: Path) -> None:
    """DVC's copy is read where there is nothing, and not where a link leads nowhere."""
    place = tmp_path / "linked"
    place.symlink_to("nowhere")
    with registered(tiny, "linked", str(place)) as version:
        assert not registry.is_superseded(version, tiny.store)
        found = audit_version(version, tiny.store, lambda found: audit(found.path, tiny.store))
        [part] = found.all_of("wrong")
        assert part.detail == f"{place} is a link"
        assert audit(place, Store(tmp_path / "none")).overall == "wrong", "the registry alone knows the place"
