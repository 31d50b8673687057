"""What is signed cannot be unsigned: signature, requirement and record are judged together."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import read_json
from tasks import registry, signing
from tasks.lineage import environment
from tasks.mlflow_client import connect
from tasks.signed import Record, record_of, records_at, write_record
from tasks.store import Store

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of alice and mallory, and a list that trusts alice."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "signers").write_text(f"alice {(folder / 'alice.pub').read_text()}")
    return folder


@pytest.fixture(autouse=True)
def _no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'never made.db'}")


def publication(folder: Path, **fields: Any) -> dict[str, Any]:
    """Write the lineage of something published."""
    folder.mkdir(exist_ok=True)
    lineage: dict[str, Any] = {
        "schema": 3,
        "sources": {},
        "stages": {},
        "name": folder.name,
        "recipe": {},
        "files": {},
        "made_of": {},
        "environment": environment(None),
        "references": {},
        **fields,
    }
    lineage["digest"] = digest_json(lineage)
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return lineage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publication(tmp_path / "tiny")
    return tmp_path / "tiny"


def sign(folder: Path, key: Path, store: Store) -> signing.Signed:
    return signing.sign(folder, key, store, lambda place: [])


def judged(folder: Path, store: Store, **how: Any) -> str:
    found = signing.judge(folder, store, **how)
    return "nothing" if found is None else found.verdict


def test_a_signature_lies_beside_the_folder_and_is_attested_by_whom_the_auditor_trusts(
    folder: Path, keys: Path, store: Store
) -> None:
    before = sorted(folder.iterdir())
    assert judged(folder, store) == "nothing"
    assert sign(folder, keys / "alice", store).path == folder.with_name("tiny.lineage.json.sig")
    assert sorted(folder.iterdir()) == before
    found = signing.judge(folder, store, signers=keys / "signers", required=True)
    assert found is not None
    assert (found.verdict, found.holds) == ("attested", True)
    assert found.detail.startswith("by alice (SHA256:")
    assert judged(folder, store) == "verified"  # by the record alone
    assert judged(folder, Store(store.root / "another")) == "consistent"  # there is no record, and no list


def test_what_was_signed_fails_without_its_signature(folder: Path, keys: Path, store: Store) -> None:
    signed = sign(folder, keys / "alice", store)
    signed.path.unlink()
    found = signing.judge(folder, store)
    assert found is not None
    assert (found.verdict, found.holds) == ("wrong", False)
    assert "it was signed by SHA256:" in found.detail


@pytest.mark.parametrize("stripped", [["digest", "name", "files"], ["files"], ["digest"]])
def test_a_publication_stripped_of_its_fields_fails_with_or_without_the_signature(
    folder: Path, keys: Path, store: Store, stripped: list[str]
) -> None:
    signed = sign(folder, keys / "alice", store)
    lineage = read_json(folder / "lineage.json")
    (folder / "lineage.json").write_text(json.dumps({k: v for k, v in lineage.items() if k not in stripped}))
    assert judged(folder, store, signers=keys / "signers") == "wrong"
    signed.path.unlink()
    assert judged(folder, store) == "wrong"
    (folder / "lineage.json").unlink()
    assert judged(folder, store) == "wrong"


def test_an_unknown_publication_in_the_place_of_a_signed_one_is_wrong_and_a_known_one_is_not(
    folder: Path, keys: Path, store: Store
) -> None:
    sign(folder, keys / "alice", store).path.unlink()
    forged = publication(folder, recipe={"forged": True})
    found = signing.judge(folder, store)
    assert found is not None
    assert "not the publication that was here" in found.detail
    write_record(store, Record(digest=forged["digest"], folder=str(folder)))  # as publishing does
    assert judged(folder, store) == "nothing"


def test_a_required_signature_must_be_there_and_be_trusted(
    folder: Path, keys: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(folder, store, required=True) == "wrong"
    lineage = read_json(folder / "lineage.json")
    write_record(store, Record(digest=lineage["digest"], folder=str(folder), required=True))
    assert judged(folder, store) == "wrong"  # by its recipe
    sign(folder, keys / "mallory", store)
    assert judged(folder, store) == "verified"
    monkeypatch.setenv("CAMERA_REQUIRE_SIGNATURE", "1")
    found = signing.judge(folder, store)
    assert found is not None
    assert (found.verdict, found.reason, found.holds) == ("unverifiable", "unjudged", False)
    shutil.copy(keys / "signers", store.root.parent / "allowed_signers")
    assert judged(folder, store) == "wrong"
    with pytest.raises(CameraError, match="no trusted key in"):
        sign(folder, keys / "mallory", store)  # who is not trusted here is told so
    sign(folder, keys / "alice", store)
    assert judged(folder, store) == "attested"


def test_another_key_than_the_recorded_one_is_wrong(folder: Path, keys: Path, store: Store) -> None:
    path = sign(folder, keys / "alice", store).path
    path.write_bytes(signing.ssh.sign((folder / "lineage.json").read_bytes(), keys / "mallory"))
    assert judged(folder, store) == "wrong"
    sign(folder, keys / "mallory", store)
    assert judged(folder, store) == "verified"


def test_what_is_wrong_is_not_signed_and_a_signing_that_fails_leaves_the_signature(
    folder: Path, keys: Path, store: Store, tmp_path: Path
) -> None:
    signed = sign(folder, keys / "alice", store)
    before = signed.path.read_bytes()
    with pytest.raises(CameraError, match="is not signed: its audit fails\n  a file: is missing"):
        signing.sign(folder, keys / "mallory", store, lambda place: ["a file: is missing"])
    (tmp_path / "no key").write_text("no key")
    with pytest.raises(CameraError, match="cannot sign with"):
        sign(folder, tmp_path / "no key", store)

    def changed(place: Path) -> list[str]:
        (place / "lineage.json").write_text((place / "lineage.json").read_text() + " ")
        return []

    with pytest.raises(CameraError, match="changed while it was signed"):
        signing.sign(folder, keys / "mallory", store, changed)
    assert signed.path.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_registry_records_the_signer_and_keeps_the_signature_for_copies(
    keys: Path, store: Store, database: str, tmp_path: Path
) -> None:
    folder = tmp_path / "signed"
    client = connect()
    run = client.create_run("0").info.run_id
    lineage = publication(folder, recipe={"of": "this test"})
    registry.register("signed", folder, lineage, None, "candidate", run)
    sign(folder, keys / "alice", store)
    (version,) = registry.versions_of(lineage["digest"])
    assert Record.of(version).key == record_of(store, lineage["digest"]).key

    other = Store(tmp_path / "another" / "store")
    assert judged(folder, other) == "verified"  # by the registry alone
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert judged(copy, other, version=version) == "verified"
    assert judged(copy, other) == "wrong"  # no copy that the registry gave
    signing.signature_of(folder).unlink()
    assert judged(folder, other, signers=keys / "signers") == "wrong"
    registry.set_tags(version, {registry.SIGNED_TAG: "[1"})
    assert judged(folder, other) == "wrong"


def test_records_that_name_two_signers_are_wrong_whichever_signed(
    keys: Path, store: Store, database: str, tmp_path: Path
) -> None:
    folder = tmp_path / "twice"
    run = connect().create_run("0").info.run_id
    lineage = publication(folder, recipe={"of": "two"})
    registry.register("twice", folder, lineage, None, "candidate", run)
    sign(folder, keys / "alice", store)
    forger = Store(tmp_path / "forger" / "store")
    path = sign(folder, keys / "mallory", forger).path  # writes the registry, and not our store
    found = signing.judge(folder, store, signers=keys / "signers")
    assert found is not None
    assert (found.verdict, found.holds) == ("wrong", False)
    assert "the records differ in who signed it" in found.detail
    path.unlink()
    assert judged(folder, store) == "wrong"
    sign(folder, keys / "alice", store)
    assert judged(folder, store, signers=keys / "signers") == "attested"


def test_a_required_signature_is_required_of_an_artifact_too_whoever_asks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = store.root / "save" / "x"
    artifact.mkdir(parents=True)
    (artifact / "manifest.json").write_text("{}")
    assert judged(artifact, store) == "nothing"
    assert judged(artifact, store, required=True) == "wrong"
    monkeypatch.setenv("CAMERA_REQUIRE_SIGNATURE", "1")
    assert judged(artifact, store) == "wrong"


def test_a_registry_that_does_not_answer_leaves_open_what_it_recorded(
    folder: Path, keys: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sign(folder, keys / "alice", store).path
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert judged(folder, store) == "verified"
    path.unlink()
    assert judged(folder, store) == "wrong"  # the store knows
    assert judged(folder, Store(store.root / "another")) == "unverifiable"
    with pytest.raises(CameraError, match="cannot be used"):
        sign(folder, keys / "alice", store)
    assert not path.exists()


def test_the_signature_of_the_publication_before_is_retired(folder: Path, keys: Path, store: Store) -> None:
    path = sign(folder, keys / "alice", store).path
    before = path.read_bytes()
    lineage = publication(folder, recipe={"of": "another"})
    write_record(store, Record(digest=lineage["digest"], folder=str(folder)))
    signing.settle_signature(folder, store, lineage["digest"])
    assert not path.exists()
    assert before.decode() in {record.signature for record in records_at(store, folder)}
    path.write_bytes(before)
    shutil.rmtree(store.root)
    signing.settle_signature(folder, store, lineage["digest"])  # nobody else has it
    assert path.with_name(f"{path.name}.old").read_bytes() == before
    sign(folder, keys / "alice", store)
    after = path.read_bytes()
    path.write_bytes(before)  # as where this one was published again, after that one
    signing.settle_signature(folder, store, lineage["digest"])
    signing.settle_signature(folder, store, lineage["digest"])
    assert path.read_bytes() == after
