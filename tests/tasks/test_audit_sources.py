"""A source that the workspace holds no longer is read where DVC keeps it: in its cache, its remote, at any revision."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_file, digest_files, digest_json
from tasks import versioning
from tasks.audit.ancestors import ancestors
from tasks.audit.finding import Finding
from tasks.audit.hashing import Evidence, reading_ahead
from tasks.lineage import stage_entry
from tasks.lineage_form import SCHEMA
from tasks.store import Artifact, Store
from tests.tasks.conftest import flip


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository whose folder `data` is pushed to a remote."""
    from dvc.repo import Repo

    root = tmp_path / "repository"
    (root / "data" / "texts").mkdir(parents=True)
    git(root, "init", "-q")
    (root / "data" / "texts" / "story.txt").write_text("the first words")
    (root / "data" / "other.txt").write_text("not read")
    with Repo.init(str(root)) as repo, repo.config.edit("repo") as config:
        config["core"] = {**config.get("core", {}), "analytics": False, "remote": "box"}
        config["remote"]["box"] = {"url": str(tmp_path / "remote")}
    commit(root)
    monkeypatch.chdir(root)
    return root


def commit(root: Path) -> str:
    versioning.add_and_push(root / "data", None)
    git(root, "add", "data.dvc", ".dvc")
    git(root, "commit", "-qm", "data")
    return git(root, "rev-parse", "HEAD")


def read_lineage(path: Path) -> dict[str, Any]:
    files = {path.name: digest_file(path)} if path.is_file() else digest_files(path, ["story.txt"])
    entry = {"name": "file", "path": str(path), "files": files, "digest": digest_json(files)}
    return {"stages": {}, "sources": {entry["digest"]: {**entry, "dvc": versioning.tracked_version(path)}}}


def audited(lineage: dict[str, Any], store: Store, from_remote: bool = False) -> Finding:
    with reading_ahead() as hashes:
        [source] = ancestors(lineage, Evidence(store, hashes, from_remote, everywhere=True))[1].parts
    return source


@pytest.mark.parametrize("path", ["data/texts", "data/texts/story.txt"])
def test_data_that_moved_on_is_verified_at_the_revision_that_was_read(
    root: Path, store: Store, path: str
) -> None:
    first = git(root, "rev-parse", "HEAD")
    lineage = read_lineage(Path(path))
    assert audited(lineage, store).detail.startswith("digest ")
    (root / "data" / "texts" / "story.txt").unlink()
    (root / "data" / "texts" / "story.txt").write_text("other words")
    commit(root)
    found = audited(lineage, store)
    assert (found.verdict, found.parts) == ("verified", [])
    assert f"data.dvc as of revision {first[:12]}, read from the cache" in found.detail
    shutil.rmtree(root / ".dvc" / "cache")
    assert "read from the remote box" in audited(lineage, store).detail


def test_data_that_is_gone_is_read_from_the_remote_and_said_to_be_nowhere_without_it(
    root: Path, store: Store, tmp_path: Path
) -> None:
    lineage = read_lineage(Path("data/texts"))
    shutil.rmtree(root / "data")
    shutil.rmtree(root / ".dvc" / "cache")
    assert audited(lineage, store).verdict == "verified"
    shutil.rmtree(tmp_path / "remote")
    found = audited(lineage, store)
    assert (found.verdict, found.reason) == ("unverifiable", "absent")
    assert "the remote box lacks it" in found.detail


def test_a_changed_byte_is_wrong_however_whole_the_remote_is(root: Path, store: Store) -> None:
    lineage = read_lineage(Path("data/texts"))
    flip(root / "data" / "texts" / "story.txt")
    found = audited(lineage, store)
    assert found.verdict == "wrong"
    assert "story.txt does not have the sha256 it had" in found.detail


def test_a_remote_with_other_bytes_is_found_when_it_is_read(root: Path, store: Store, tmp_path: Path) -> None:
    lineage = read_lineage(Path("data/texts"))
    size = len("the first words")
    [kept] = [
        path for path in (tmp_path / "remote").rglob("*") if path.is_file() and path.stat().st_size == size
    ]
    flip(kept)
    found = audited(lineage, store, from_remote=True)
    [version] = found.parts
    assert version.verdict == "wrong"
    assert "story.txt in the remote box does not have the sha256" in version.detail


def test_a_model_of_the_hub_is_read_in_the_hubs_cache_and_never_fetched(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    commit = "a" * 40
    snapshot = tmp_path / "cache" / "models--of--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "tokenizer.json").write_text("[]")
    sources: dict[str, Any] = {}
    for name, about in (("config.json", {"revision": commit}), ("tokenizer.json", {})):
        files = digest_files(snapshot, [name])
        digest = digest_json(files)
        sources[digest] = {"name": name, "path": "of/tiny", "files": files, "digest": digest, **about}

    def found() -> list[str]:
        with reading_ahead() as hashes:
            evidence = Evidence(store, hashes, everywhere=True)
            return [part.verdict for part in ancestors({"stages": {}, "sources": sources}, evidence)[1].parts]

    assert found() == ["verified", "verified"], "the tokenizer is of the revision that is beside it"
    (snapshot / "config.json").write_text("{ }")
    assert found() == ["wrong", "verified"]
    shutil.rmtree(snapshot)
    assert found() == ["unverifiable", "unverifiable"]


def test_a_source_that_was_moved_is_found_where_this_project_read_it_last(
    tmp_path: Path, store: Store
) -> None:
    (tmp_path / "first").write_text("words")
    files = {"first": digest_file(tmp_path / "first")}
    digest = digest_json(files)

    def made(key: str, place: Path) -> Artifact:
        """An artifact whose stage read the source in a place."""
        lineage = {
            "schema": SCHEMA,
            "sources": {digest: {"name": "file", "digest": digest, "path": str(place), "files": files}},
            "stages": {},
        }
        about = {"step": key, "version": 1, "options": {}, "inputs": {}}
        return store.make(
            "fetch", digest_json(key), lambda folder: write_key(folder, key), about, lineage, resumes=False
        )

    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "first"
    artifacts = [made("a", tmp_path / "first"), made("b", moved)]
    stages = {each.key: stage_entry(each.manifest) for each in artifacts}
    lineage = {**artifacts[0].read_lineage(), "stages": stages}
    shutil.move(tmp_path / "first", moved)
    with reading_ahead() as hashes:
        [found] = ancestors(lineage, Evidence(store, hashes))[1].parts
    assert (found.verdict, found.name) == ("verified", f"file {tmp_path / 'first'}")
    moved.write_text("other")
    with reading_ahead() as hashes:
        assert ancestors(lineage, Evidence(store, hashes))[1].verdict == "wrong"


def write_key(folder: Path, key: str) -> dict[str, float]:
    (folder / "content").write_text(key)
    return {}
