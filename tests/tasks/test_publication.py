"""What the store keeps of a publication is read in one place, and what is damaged there costs a line, not the others."""

import json
from pathlib import Path
from typing import Any

import pytest

from camera.digests import copy_hashed, digest_file
from camera.errors import CameraError
from tasks import gc
from tasks.publication import PublicationRecord, damage, read_record, refuse_foreign, write_record
from tasks.recipe import PublishOptions
from tasks.signed import Record
from tasks.signed import write_record as record_publication
from tasks.stages import publish
from tasks.store import Store
from tests.tasks.publications import Publication
from tests.tasks.test_signing import publication

DAY = 86400.0


@pytest.fixture(autouse=True)
def _no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'never made.db'}")


@pytest.mark.parametrize(
    "change",
    [
        {"folder": 1},
        {"folder": "/a\0b"},
        {"lineage_digest": None},
        {"name": None},
        {"dvc": {"md5": 3}},
        {"dvc": []},
        {"registry": "tiny"},
        {"registry_error": {}},
    ],
)
def test_a_record_with_wrong_fields_is_refused_and_names_the_first(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    whole = PublicationRecord(name="tiny", folder="/published/tiny", lineage_digest="0" * 64)
    write_record(tmp_path, whole)
    assert read_record(tmp_path) == whole
    (tmp_path / "published.json").write_text(json.dumps(whole.model_dump() | change))
    with pytest.raises(CameraError, match=r"published\.json is no record of a publication: "):
        read_record(tmp_path)


def test_copying_gives_the_digest_of_what_was_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights" * 3_000_000)
    assert (
        copy_hashed(tmp_path / "a", tmp_path / "b")
        == digest_file(tmp_path / "b")
        == digest_file(tmp_path / "a")
    )


def test_a_place_that_we_published_to_is_ours_though_its_lineage_is_damaged(
    store: Store, tmp_path: Path
) -> None:
    target = tmp_path / "tiny"
    lineage = publication(target)
    (target / "lineage.json").write_text("[NaN")
    with pytest.raises(CameraError, match="exists with other content"):
        refuse_foreign(target, "tiny", store)
    record_publication(store, Record(digest=lineage["digest"], folder=str(target)))
    refuse_foreign(target, "tiny", store)
    assert damage(target) is not None
    (tmp_path / "file").touch()
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(CameraError, match="exists with other content"):
            refuse_foreign(taken, "tiny", store)


@pytest.mark.parametrize("leads", ["to a copy of it", "nowhere"])
def test_a_link_in_the_place_is_refused_before_the_work_and_holds_nothing(
    store: Store, tmp_path: Path, leads: str
) -> None:
    lineage = publication(tmp_path / "copy")
    target = tmp_path / "tiny"
    target.symlink_to("copy" if leads == "to a copy of it" else "nowhere")
    record_publication(store, Record(digest=lineage["digest"], folder=str(target)))
    with pytest.raises(CameraError, match=r"tiny is a link, and would be replaced: remove the link, or set"):
        publish.check_place(PublishOptions(folder=str(tmp_path), dvc=False), "tiny", store)
    assert "is a link" in str(damage(target, lineage["digest"]))


@pytest.mark.parametrize("left", [".tiny.making", ".tiny.old"])
def test_a_link_that_lies_where_a_publication_is_made_goes_and_what_it_leads_to_stays(
    tiny: Publication, left: str
) -> None:
    (tiny.folder / "lineage.json").write_text("[NaN")
    link = tiny.folder.with_name(left)
    link.symlink_to("other")
    tiny.publish()
    assert damage(tiny.folder) is None
    assert not link.is_symlink()
    assert damage(tiny.other) is None


KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def published(store: Store, tmp_path: Path) -> Path:
    """A publication that descends from one stage; another artifact is nobody's."""
    folder = tmp_path / "tiny"
    stage = {
        "step": "save",
        "stage": "save",
        "version": 1,
        "key": KEY,
        "digest": "0" * 64,
        "options": {},
        "inputs": {},
    }
    lineage = publication(folder, stages={KEY: stage})

    def fill(place: Path) -> dict[str, float]:
        write_record(
            place, PublicationRecord(name="tiny", folder=str(folder), lineage_digest=lineage["digest"])
        )
        return {}

    with store.lock("key"):
        store.make(
            publish.STAGE.name,
            "key",
            fill,
            {},
            {"schema": 2, "sources": {}, "stages": {KEY: stage}},
            resumes=False,
        )
    for key in (KEY, OTHER):
        with store.lock(key):
            store.make("save", key, lambda place: (place / "x").write_text("x") and {}, {}, {}, resumes=False)
    return folder


def kept(store: Store) -> dict[str, str | None]:
    """Why each artifact would stay."""
    refers = gc.references(store, DAY)
    return {artifact.key[0]: refers.reason(artifact) for artifact in store.all("save")}


def test_what_is_published_keeps_its_ancestors_and_what_was_taken_away_does_not(
    store: Store, published: Path
) -> None:
    assert kept(store) == {"a": f"published as {published}", "b": None}
    published.rename(published.with_name("elsewhere"))
    assert kept(store) == {"a": None, "b": None}


@pytest.mark.parametrize("content", ["[NaN", "{}", '{"digest": "\\ud800"}', "null", None])
def test_a_damaged_publication_keeps_what_it_descends_from_and_says_so(
    store: Store, published: Path, content: str | None
) -> None:
    path = published / "lineage.json"
    path.unlink() if content is None else path.write_text(content)
    assert kept(store) == {"a": f"published as {published}, which is damaged", "b": None}


def test_a_later_publication_in_the_folder_frees_what_the_one_before_descends_from(
    store: Store, published: Path
) -> None:
    lineage = publication(published, recipe={"another": 1})
    assert kept(store)["a"] == f"published as {published}, which is damaged"  # nobody published that
    record_publication(store, Record(digest=lineage["digest"], folder=str(published)))
    assert kept(store)["a"] is None


@pytest.mark.parametrize("name", ["published.json", "lineage.json", "manifest.json"])
@pytest.mark.parametrize("content", ["[NaN", "[]", '{"folder": 3}'])
def test_a_damaged_record_in_the_store_keeps_what_the_folder_says_or_everything(
    store: Store, published: Path, name: str, content: str
) -> None:
    path = store.path("publish", "key") / name
    path.chmod(0o644)
    path.write_text(content)
    reasons = kept(store)
    if name == "published.json":
        assert all(
            "is damaged, so what it refers to is not known" in str(reason) for reason in reasons.values()
        )
        done = gc.collect(store, gc.references(store, DAY), older_than=0, intermediates=True)
        assert done.removed == []
    else:
        assert reasons == {"a": f"published as {published}, whose record in the store is damaged", "b": None}


def test_what_was_used_since_the_references_were_looked_up_stays(store: Store, published: Path) -> None:
    import os
    import time

    refers = gc.references(store, DAY)
    time.sleep(0.05)
    os.utime(store.path("save", OTHER) / "manifest.json")  # as a run does that finds it
    assert [gone.name for gone in gc.collect(store, refers, older_than=0).removed] == []
    refers = gc.references(store, DAY)
    assert len(gc.collect(store, refers, older_than=0).removed) == 1
