"""From a published folder the audit walks back to the sources, and finds whatever changed on the way."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.files import read_json
from tasks import promotion, registry
from tasks.audit import Finding, audit
from tasks.audit.rebuild import rebuild
from tasks.diff import compare
from tasks.pipeline import build_pipeline
from tasks.project import Project
from tasks.published import Found, audit_found, audit_version
from tasks.recipe import check_recipe
from tasks.run import Outcome, run_pipeline
from tasks.sources import find_sources
from tasks.stage import Request, find, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import WORDS, Quiet, flip
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True)
class Finished:
    """A whole run: tracked by MLflow, versioned by DVC."""

    root: Path
    store: Store
    outcome: Outcome

    @property
    def published(self) -> Path:
        return self.root / "published" / "tiny"

    @property
    def gguf(self) -> Path:
        return next(path for path in self.published.glob("*.gguf") if "twin" not in path.name)

    def audit(self) -> Finding:
        return audit(self.published, self.store)

    def artifact(self, step: str) -> Artifact:
        return self.outcome.artifacts[step]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, database_file: Path) -> Iterator[Finished]:
    """One run for all tests of this file; whoever damages it mends it."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("project")
    (root / "story.txt").write_text("".join(f"{number}. {WORDS}" for number in range(60)))
    Repo.init(str(root), no_scm=True).close()
    with Repo(str(root)) as repo, repo.config.edit("repo") as config:
        config["remote"]["box"] = {"url": str(root / "remote")}
        config["core"] = {**config.get("core", {}), "remote": "box", "analytics": False}
    text = {"name": "file", "path": str(root / "story.txt")}
    recipe = check_recipe(
        {
            "name": "tiny",
            "model": str(tiny_checkpoint(root / "model", "PanguEmbedded")),
            "calibration": {**text, "samples": 3, "length": 32},
            "capture": {"batch_size": 2, "device": "cpu"},
            "prune": {"ratio": 0.35},
            "quantize": {"twin": "q4_0"},
            "evaluate": {"datasets": [text], "window": 64, "max_windows": 2, "device": "cpu"},
            "benchmark": {"decode": [2], "repeats": 1, "device": "cpu"},
            "publish": {"folder": str(root / "published")},
        },
        "test",
    )
    store = Store(root / "store")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database_file}")

        def performed(request: Request) -> tuple[Artifact, bool]:
            cached = find(store, request) is not None
            return perform(store, request), cached

        pipeline = build_pipeline(recipe, find_sources(recipe))
        outcome = run_pipeline(pipeline, performed, Project(root / "home"), Quiet())
        yield Finished(root, store, outcome)


@contextmanager
def damaged(path: Path, at: int = -1) -> Iterator[None]:
    """A flipped bit for as long as the block lasts."""
    mode = path.stat().st_mode
    flip(path, at)
    try:
        yield
    finally:
        flip(path, at)
        path.chmod(mode)


@contextmanager
def absent(path: Path) -> Iterator[None]:
    """A file or folder out of sight for as long as the block lasts."""
    hidden = path.parent.parent / f"hidden {path.name}"
    path.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(path)


@contextmanager
def rewritten(path: Path, content: Any) -> Iterator[None]:
    before, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        yield
    finally:
        path.write_bytes(before)
        path.chmod(mode)


def part_of(finding: Finding, name: str) -> Finding:
    return next(part for part in finding.every() if part.name == name)


def wrong(finding: Finding) -> list[str]:
    return [f"{part.name}: {part.detail}" for part in finding.all_of("wrong")]


def unverifiable(finding: Finding) -> list[str]:
    return [f"{part.name}: {part.detail}" for part in finding.all_of("unverifiable")]


def test_an_untouched_publication_is_right_in_every_part(finished: Finished) -> None:
    finding = finished.audit()
    assert wrong(finding) == []
    assert unverifiable(finding) == []
    names = [part.name for part in finding.every()]
    for part in ("DVC version", "MLflow run", "MLflow registry", "stages", "sources"):
        assert part in names
    assert f"lineage inside {finished.gguf.name}" in names


def test_every_stage_and_source_of_the_run_is_walked(finished: Finished) -> None:
    stages, sources = finished.audit().parts[-2:]
    walked = {part.name.rsplit(" ", 1)[0] for part in stages.parts}
    assert walked == set(finished.outcome.artifacts) - {"publish"}
    assert sorted(part.name.split()[0] for part in sources.parts) == ["file", "model", "tokenizer"]


def test_stages_are_walked_after_what_they_read(finished: Finished) -> None:
    stages = finished.audit().parts[-2]
    order = [part.name.rsplit(" ", 1)[0] for part in stages.parts]
    chain = [
        "fetch calibration",
        "capture",
        "score",
        "prune",
        "save",
        "quantize",
        "convert",
        "benchmark",
        "report",
    ]
    assert [order.index(name) for name in chain] == sorted(order.index(name) for name in chain)


@pytest.mark.parametrize("file", ["config.json", "README.md", "report.html", "tokenizer.model"])
def test_a_changed_published_file_is_wrong_and_named(finished: Finished, file: str) -> None:
    with damaged(finished.published / file):
        finding = finished.audit()
    assert any(f"{file} does not have the sha256" in line for line in wrong(finding))
    assert any(line.startswith("DVC version") for line in wrong(finding))
    assert finding.parts[-2].all_of("wrong") == []  # of the stages, all is well


def test_a_changed_weight_of_the_published_model_is_wrong_and_named(finished: Finished) -> None:
    weights = next(finished.published.glob("*.safetensors"))
    with damaged(weights):
        assert any(weights.name in line for line in wrong(finished.audit()))
    with damaged(finished.gguf):
        assert any(finished.gguf.name in line for line in wrong(finished.audit()))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_missing_or_extra_published_file_is_wrong_and_named(finished: Finished, change: str) -> None:
    if change == "missing":
        with absent(finished.published / "config.json"):
            lines = wrong(finished.audit())
        assert any("config.json is missing" in line for line in lines)
        return
    extra = finished.published / "extra.bin"
    extra.write_text("x")
    lines = wrong(finished.audit())
    extra.unlink()
    assert any("extra.bin is not part of the publication" in line for line in lines)


def test_a_changed_published_lineage_is_wrong(finished: Finished) -> None:
    path = finished.published / "lineage.json"
    lineage = read_json(path)
    with rewritten(path, {**lineage, "name": "tinny"}):
        assert any("does not have its own digest" in line for line in wrong(finished.audit()))


@pytest.mark.parametrize("step", ["capture", "score", "prune", "quantize baseline", "report"])
def test_a_flipped_bit_in_an_artifact_is_wrong_and_named(finished: Finished, step: str) -> None:
    artifact = finished.artifact(step)
    file = sorted(artifact.manifest["files"])[0]
    with damaged(artifact.path / file):
        lines = wrong(finished.audit())
    assert len(lines) == 1
    assert lines[0].startswith(f"{step} {artifact.key[:12]}")
    assert f"{file} does not have the sha256" in lines[0]


def test_an_artifact_that_is_gone_is_unverified_not_wrong(finished: Finished) -> None:
    with absent(finished.artifact("capture").path):
        finding = finished.audit()
    assert wrong(finding) == []
    assert [line.split(":")[0] for line in unverifiable(finding)] == [
        f"capture {finished.artifact('capture').key[:12]}"
    ]


def test_without_the_store_the_published_folder_is_still_verified(finished: Finished, tmp_path: Path) -> None:
    finding = audit(finished.published, Store(tmp_path / "empty"))
    assert wrong(finding) == []
    assert [part.name for part in finding.all_of("verified")][:2] == ["lineage.json", "11 published files"]
    assert "as MLflow's registry recorded" in part_of(finding, "publication").detail
    reasons = Counter(part.reason for part in finding.all_of("unverifiable"))
    assert reasons == {"absent": len(finished.outcome.artifacts) - 1, "not looked at": 3}
    everywhere = audit(finished.published, Store(tmp_path / "empty"), everywhere=True)
    assert {part.reason for part in everywhere.all_of("unverifiable")} == {"absent"}
    with damaged(finished.published / "config.json"):
        assert wrong(audit(finished.published, Store(tmp_path / "empty")))


def test_a_changed_source_weight_is_wrong_and_named(finished: Finished) -> None:
    with damaged(finished.root / "model" / "model.safetensors"):
        lines = wrong(finished.audit())
    assert len(lines) == 1
    assert lines[0].startswith("model ")
    assert "model.safetensors does not have the sha256 it had" in lines[0]


def test_a_changed_dataset_is_wrong_and_named(finished: Finished) -> None:
    with damaged(finished.root / "story.txt"):
        lines = wrong(finished.audit())
    assert len(lines) == 1
    assert "story.txt does not have the sha256 it had" in lines[0]


def test_a_source_that_is_gone_is_unverified_not_wrong(finished: Finished) -> None:
    with absent(finished.root / "model"):
        finding = finished.audit()
    assert wrong(finding) == []
    assert {line.split(" ")[0] for line in unverifiable(finding)} == {"model", "tokenizer"}


def tampered(finished: Finished, change: Any) -> list[str]:
    """What the audit calls wrong when a forger changes the published lineage and its digest."""
    path = finished.published / "lineage.json"
    lineage = read_json(path)
    change(lineage)
    body = {name: value for name, value in lineage.items() if name != "digest"}
    with rewritten(path, {**body, "digest": digest_json(body)}):
        return wrong(finished.audit())


def test_forged_options_do_not_match_their_key(finished: Finished) -> None:
    key = finished.artifact("prune").key

    def change(lineage: dict[str, Any]) -> None:
        lineage["stages"][key]["options"]["prune"]["ratio"] = 0.1

    lines = tampered(finished, change)
    assert any(line.startswith("prune ") and "key is not the digest" in line for line in lines)
    assert any("does not agree with lineage.json" in line for line in lines)  # the GGUF knows better


def test_a_forged_source_does_not_match_what_was_read(finished: Finished) -> None:
    def change(lineage: dict[str, Any]) -> None:
        [model] = [entry for entry in lineage["sources"].values() if entry["name"] == "model"]
        model["files"]["model.safetensors"] = "0" * 64

    assert any(
        line.startswith("model ") and "not that of its files" in line for line in tampered(finished, change)
    )


def test_a_stage_cut_out_of_the_lineage_is_missed(finished: Finished) -> None:
    key = finished.artifact("score").key
    lines = tampered(finished, lambda lineage: lineage["stages"].pop(key))
    assert any(line.startswith("prune ") and "input scores is not in the lineage" in line for line in lines)


def test_a_stage_that_descends_from_itself_is_wrong(finished: Finished) -> None:
    score, prune = finished.artifact("score").key, finished.artifact("prune").key

    def change(lineage: dict[str, Any]) -> None:
        lineage["stages"][score]["inputs"]["statistics"]["key"] = prune

    assert any("descends from itself" in line for line in tampered(finished, change))


def test_a_forged_digest_is_not_what_mlflow_recorded(finished: Finished) -> None:
    key = finished.artifact("report").key

    def change(lineage: dict[str, Any]) -> None:
        lineage["stages"][key]["digest"] = "0" * 64

    assert any(line.startswith("MLflow run") and "report" in line for line in tampered(finished, change))


def test_a_gguf_file_alone_can_be_audited(finished: Finished, tmp_path: Path) -> None:
    assert audit(finished.gguf, finished.store).overall == "verified"
    copy = Path(shutil.copy(finished.gguf, tmp_path / "model.gguf"))
    finding = audit(
        copy, finished.store
    )  # without lineage.json beside it, the store knows its bytes and sources
    assert finding.overall == "verified"
    flip(copy)
    assert any("bytes of model.gguf" in line for line in unverifiable(audit(copy, finished.store)))


def test_a_damaged_gguf_beside_its_lineage_is_wrong(finished: Finished) -> None:
    with damaged(finished.gguf):
        lines = wrong(audit(finished.gguf, finished.store))
    assert any(
        line.startswith(f"bytes of {finished.gguf.name}: ") and "does not have the sha256" in line
        for line in lines
    )


def test_an_artifact_can_be_audited(finished: Finished) -> None:
    artifact = finished.artifact("save")
    finding = audit(artifact.path, finished.store)
    assert (wrong(finding), unverifiable(finding)) == ([], [])
    file = artifact.path / "config.json"
    with damaged(file):
        assert any(
            "config.json does not have the sha256" in line
            for line in wrong(audit(artifact.path, finished.store))
        )
    [stages, _] = finding.parts[-2:]
    assert {part.name.rsplit(" ", 1)[0] for part in stages.parts} == {
        "fetch calibration",
        "capture",
        "score",
        "prune",
    }


def test_a_publication_copied_without_its_repository_is_unverified_there(
    finished: Finished, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished.published, tmp_path / "tiny"))
    shutil.copy(finished.published.with_name("tiny.dvc"), tmp_path / "tiny.dvc")
    finding = audit(copy, finished.store)
    assert wrong(finding) == []
    assert [line.split(":")[0] for line in unverifiable(finding)] == ["DVC version"]


def test_another_tracking_database_leaves_the_run_unverifiable(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    finding = finished.audit()
    assert wrong(finding) == []
    assert [line.split(":")[0] for line in unverifiable(finding)] == ["MLflow run", "signature"]


def test_what_has_no_lineage_is_refused(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="has no lineage"):
        audit(finished.root / "model", finished.store)
    with pytest.raises(CameraError, match="does not exist"):
        audit(tmp_path / "gone", finished.store)
    with pytest.raises(CameraError, match=r"story\.txt"):
        audit(finished.root / "story.txt", finished.store)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"files": {}}',
        '{"stages": [], "sources": {}}',
        '{"stages": {"x": {}}, "sources": {}}',
        '{"stages": {}, "sources": {"x": 3}}',
    ],
)
def test_a_lineage_that_is_none_is_wrong_in_words(tmp_path: Path, store: Store, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "lineage.json").write_text(content)
    [found] = audit(tmp_path / "model", store).all_of("wrong")
    assert "lineage.json is no" in found.detail


def test_an_evicted_artifact_is_unverified_and_says_so(finished: Finished) -> None:
    artifact = finished.artifact("capture")
    with finished.store.lock(artifact.key):
        hidden = finished.store.evict("capture", artifact.key)
    try:
        [part] = finished.audit().all_of("unverifiable")
    finally:
        hidden.rename(artifact.path)
    assert (part.name, part.reason) == (f"capture {artifact.key[:12]}", "evicted")


def test_every_changed_file_is_named_at_once(finished: Finished) -> None:
    with damaged(finished.published / "config.json"), damaged(finished.gguf):
        lines = "\n".join(wrong(finished.audit()))
    assert "config.json does not have the sha256" in lines
    assert f"{finished.gguf.name} does not have the sha256" in lines


def test_what_mlflow_recorded_of_recipe_and_gguf_is_compared(finished: Finished) -> None:
    from mlflow.tracking import MlflowClient

    def change(lineage: dict[str, Any]) -> None:
        lineage["recipe"]["prune"]["ratio"] = 0.1

    assert any("recorded another recipe: prune.ratio" in line for line in tampered(finished, change))
    client = MlflowClient()
    [version] = client.search_model_versions("name = 'tiny'")
    tag = f"sha256.{finished.gguf.name}"
    client.set_model_version_tag("tiny", version.version, tag, "0" * 64)
    try:
        assert any("names other GGUF digests" in line for line in wrong(finished.audit()))
    finally:
        client.set_model_version_tag("tiny", version.version, tag, version.tags[tag])


def test_the_dvc_remote_is_read_again_and_damage_there_is_found(finished: Finished) -> None:
    finding = audit(finished.published, finished.store, from_remote=True)
    assert wrong(finding) == []
    [remote] = [part for part in finding.every() if part.name == "DVC remote"]
    assert "read again from the remote box" in remote.detail
    sizes = {path.stat().st_size: path for path in (finished.root / "remote").rglob("*") if path.is_file()}
    copy = sizes[finished.gguf.stat().st_size]
    with damaged(copy):
        lines = wrong(audit(finished.published, finished.store, from_remote=True))
    assert any(line.startswith("DVC remote") and ".gguf" in line for line in lines)
    with absent(finished.root / "remote" / "files"):
        finding = audit(finished.published, finished.store, from_remote=True)
    assert wrong(finding) == []
    assert [part.reason for part in finding.all_of("unverifiable")] == ["absent"]


def test_the_recipe_run_again_from_nothing_gives_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    lineage = read_json(finished.published / "lineage.json")
    finding = rebuild(lineage, tmp_path)
    assert finding.verdict == "verified"
    assert "bit for bit" in finding.detail
    assert list(tmp_path.iterdir()) == []
    lineage["files"][finished.gguf.name] = "0" * 64
    for entry in lineage["stages"].values():
        entry["environment"]["packages"]["torch"] = "1.0"
    finding = rebuild(lineage, tmp_path)
    assert (finding.verdict, finding.reason) == ("unverifiable", "other versions")
    assert "was 1.0" in finding.detail
    assert finished.gguf.name in finding.detail
    with absent(finished.root / "story.txt"):
        assert rebuild(lineage, tmp_path).reason == "absent"


def versioned(finished: Finished) -> Finding:
    """What is said of the version in the registry."""

    def auditing(found: Found) -> Finding:
        return audit_found(found, finished.store, from_remote=False, signers=None, signed=False)

    return audit_version(registry.find_version("tiny@1"), finished.store, auditing)


def test_a_version_is_wrong_where_its_folder_is_however_whole_dvcs_copy_is(finished: Finished) -> None:
    assert versioned(finished).overall == "verified"
    path = finished.published / "lineage.json"
    with damaged(finished.published / "config.json"):
        assert versioned(finished).overall == "wrong"
        lineage = {name: value for name, value in read_json(path).items() if name != "digest"}
        lineage["files"]["config.json"] = digest_file(finished.published / "config.json")
        with rewritten(path, {**lineage, "digest": digest_json(lineage)}):  # of no known publication
            assert versioned(finished).overall == "wrong"
        with absent(path):
            assert versioned(finished).overall == "wrong"
    with rewritten(path, "{"):
        assert versioned(finished).overall == "wrong"


def test_a_dvc_version_that_was_recorded_is_missed_and_another_is_wrong(finished: Finished) -> None:
    file = finished.published.with_name("tiny.dvc")
    with absent(file):
        [version] = finished.audit().all_of("unverifiable")
        assert (version.name, version.reason) == ("DVC version", "absent")
    with rewritten(file, file.read_text().replace("md5: ", f"md5: {'0' * 32}", 1)):
        assert any(line.startswith("DVC version") for line in wrong(finished.audit()))
    with rewritten(file, "[" * 20_000):
        assert any(line.startswith("DVC version") for line in wrong(finished.audit()))


def test_a_version_whose_folder_is_not_here_is_read_in_dvc_and_that_is_said(finished: Finished) -> None:
    with absent(finished.published):
        found = versioned(finished)
    [folder] = found.all_of("unverifiable")
    assert folder.reason == "absent"
    assert "DVC's copy of" in folder.detail
    assert part_of(found, "DVC version").verdict == "verified"


def test_a_model_is_promoted_once_audited_and_the_alias_goes_back(finished: Finished) -> None:
    def audited(folder: Path) -> list[str]:
        return wrong(audit(folder, finished.store))

    first = registry.find_version("tiny")
    assert first.aliases == ("candidate",)
    with damaged(finished.gguf), pytest.raises(CameraError, match=r"cannot be production: its audit fails"):
        promotion.promote(first, audited)
    assert registry.find_version("tiny").aliases == ("candidate",)
    promotion.promote(first, audited)
    assert registry.find_version("tiny@production").number == first.number
    with pytest.raises(CameraError, match="nothing had the alias production before"):
        promotion.previous_holder("tiny")

    published, before = finished.published, finished.published.with_name("first")
    shutil.copytree(published, before)
    (published.with_name("tiny.dvc")).rename(published.with_name("first.dvc"))
    try:
        second = republished(finished)
        promotion.promote(second, lambda folder: [])
        assert promotion.previous_holder("tiny").number == first.number
        with registry.files_of(registry.find_version(first.label)) as folder:  # DVC still has the first
            assert folder != published
            assert read_json(folder / "lineage.json")["digest"] == first.lineage_digest
            assert (folder / "config.json").stat().st_nlink > 1, "a copy takes no room: it is DVC's cache"
            changes = compare(folder, published, finished.store)
        superseded = versioned(finished)
        assert "holds a later publication; DVC's copy" in part_of(superseded, "published folder").detail
        assert wrong(superseded) == []
        assert [(change.section, change.what) for change in changes.changes] == [
            ("recipe", "benchmark.repeats")
        ]
        assert [layer.share for layer in changes.overlap] == [1.0, 1.0]
        promotion.promote(promotion.previous_holder("tiny"), lambda folder: [], how="rollback")
        assert registry.find_version("tiny@production").number == first.number
        assert [holder.how for holder in promotion.history("tiny")] == ["promote", "promote", "rollback"]
    finally:
        shutil.rmtree(published)
        before.rename(published)
        published.with_name("first.dvc").rename(published.with_name("tiny.dvc"))


def republished(finished: Finished) -> registry.Version:
    """Another publication of the same name in the same folder, whose lineage says another recipe."""
    path = finished.published / "lineage.json"
    lineage = {name: value for name, value in read_json(path).items() if name != "digest"}
    lineage["recipe"]["benchmark"]["repeats"] = 9
    path.chmod(0o644)
    path.unlink()
    path.write_text(json.dumps({**lineage, "digest": digest_json(lineage)}))
    registry.register(
        "tiny", finished.published, read_json(path), None, "candidate", lineage["references"]["mlflow_run"]
    )
    return registry.find_version("tiny")
