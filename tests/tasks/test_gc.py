"""Room is made in the store without breaking a lineage, a run at work, or what a later run goes on from."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from camera.digests import digest_json
from camera.files import read_json
from tasks import gc
from tasks.gc import References, collect
from tasks.lease import lease
from tasks.pipeline import Pipeline, build_pipeline
from tasks.plan import execute
from tasks.sources import find_sources
from tasks.stage import Request, Step, find, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import MakeRecipe, flip

DAY = 86400.0


def make(store: Store, key: str, size: int = 10, unused_days: float = 0) -> Artifact:
    def fill(folder: Path) -> dict[str, float]:
        (folder / "a.bin").write_bytes(key[:1].encode() * size)
        return {}

    with store.lock(key):
        made = store.make("stage", key, fill, {"step": f"step {key}"}, {"stages": {}}, resumes=False)
    then = time.time() - unused_days * DAY
    os.utime(made.path / "manifest.json", (then, then))
    return made


def keys(store: Store) -> set[str]:
    return {path.name for path in (store.root / "stage").iterdir()}


def test_what_was_long_unused_goes_and_what_was_used_lately_stays(store: Store) -> None:
    make(store, "old", unused_days=40)
    make(store, "young", unused_days=5)
    done = collect(store, References(), older_than=30 * DAY)
    assert [gone.name for gone in done.removed if gone.kind == "artifact"] == ["step old old"]
    assert keys(store) == {"young"}
    assert (done.size_before, done.size_after) == (20, 10)


def test_finding_an_artifact_is_using_it(store: Store) -> None:
    make(store, "old", unused_days=40)
    assert store.find("stage", "old") is not None
    assert collect(store, References(), older_than=30 * DAY).removed == []


def test_a_size_is_reached_with_the_longest_unused_first(store: Store) -> None:
    for number, key in enumerate("abcd"):
        make(store, key, size=100, unused_days=4 - number)
    collect(store, References(), older_than=30 * DAY, max_size=250)
    assert keys(store) == {"c", "d"}


def test_what_is_referred_to_stays_at_any_age_and_says_why(store: Store) -> None:
    make(store, "p", unused_days=400)
    run = make(store, "r", unused_days=400)
    make(store, "x", unused_days=400)
    refers = References(keys={"p": "published as m"}, digests={run.digest: "run tiny"})
    done = collect(store, refers, older_than=DAY, max_size=0)
    assert keys(store) == {"p", "r"}
    assert done.kept == {"published as m": 10, "run tiny": 10}


def test_a_dry_run_says_the_same_and_removes_nothing(store: Store) -> None:
    make(store, "old", unused_days=40)
    (store.root / "stage" / ".x.1.doomed").mkdir()
    planned = collect(store, References(), older_than=30 * DAY, dry_run=True)
    assert keys(store) == {"old", ".x.1.doomed"}
    done = collect(store, References(), older_than=30 * DAY)
    assert [gone.name for gone in planned.removed] == [gone.name for gone in done.removed]
    assert keys(store) == set()


def test_an_evicted_artifact_keeps_manifest_and_lineage(store: Store) -> None:
    made = make(store, "old", unused_days=40)
    collect(store, References(), older_than=30 * DAY)
    assert store.find("stage", "old") is None
    gone = store.evicted("stage", "old")
    assert gone is not None
    assert (gone.digest, gone.manifest, gone.evicted) == (made.digest, made.manifest, True)
    assert gone.read_lineage() == {"stages": {}}
    make(store, "old")
    assert store.evicted("stage", "old") is None  # it is whole again


def test_a_changed_manifest_of_an_evicted_artifact_is_not_believed(store: Store) -> None:
    make(store, "old", unused_days=40)
    collect(store, References(), older_than=30 * DAY)
    flip(store.tombstone("stage", "old") / "manifest.json", 30)
    assert store.evicted("stage", "old") is None


def test_what_is_being_made_or_used_now_stays(store: Store) -> None:
    for key in ("held", "named", "free"):
        make(store, key, unused_days=40)
    with store.lock("held"), lease(store) as in_use:
        in_use("named")
        collect(store, References(), older_than=30 * DAY)
        assert keys(store) == {"held", "named"}
    collect(store, References(), older_than=30 * DAY)
    assert keys(store) == set()


def test_the_lease_of_a_killed_run_holds_nothing(store: Store) -> None:
    make(store, "old", unused_days=40)
    left = store.root / ".running" / "1-dead"
    left.parent.mkdir()
    left.write_text("old\n")
    collect(store, References(), older_than=30 * DAY)
    assert keys(store) == set()
    assert not left.exists()


def test_leftovers_of_killed_processes_are_cleaned(store: Store) -> None:
    folder = store.root / "stage"
    for name in (".a.1.doomed", ".b.working", ".c.working", ".d.working"):
        (folder / name).mkdir(parents=True)
        (folder / name / "layer").write_bytes(b"12345")
    long_ago = time.time() - 40 * DAY
    for name in (".b.working", ".d.working"):
        os.utime(folder / name / "layer", (long_ago, long_ago))
        os.utime(folder / name, (long_ago, long_ago))
    (folder / ".b.working.json").write_text("{}")
    with store.lock("d"):
        done = collect(store, References(), older_than=30 * DAY)
    assert keys(store) == {".c.working", ".d.working"}  # one may be gone on with, one is at work
    assert sorted((gone.kind, gone.size_bytes) for gone in done.removed) == [
        ("leftover", 5),
        ("unfinished", 5),
    ]


def test_locks_that_nobody_holds_are_removed_and_work_again(store: Store) -> None:
    lock = store.root / ".locks" / "a"
    lock.parent.mkdir(parents=True)
    lock.touch()  # as a killed holder leaves it
    long_ago = time.time() - 40 * DAY
    os.utime(lock, (long_ago, long_ago))
    collect(store, References(), older_than=30 * DAY)
    assert not lock.exists()
    with store.lock("a"):
        assert lock.exists()


@pytest.fixture
def pipeline(recipe: MakeRecipe) -> Pipeline:
    checked = recipe(evaluate={"window": 16, "max_windows": 1})
    return build_pipeline(checked, find_sources(checked))


Run = Callable[[Pipeline], tuple[dict[str, Artifact], list[str]]]


@pytest.fixture
def run(store: Store) -> Run:
    """Run a pipeline; what came out, and which steps were executed."""

    def all_steps(pipeline: Pipeline) -> tuple[dict[str, Artifact], list[str]]:
        executed: list[str] = []

        def made(step: Step, request: Request) -> Artifact:
            if find(store, request) is None:
                executed.append(step.name)
            return perform(store, request)

        return execute(pipeline, made, store=store), executed

    return all_steps


INTERMEDIATES = ["fetch calibration", "capture", "score", "prune", "save", "quantize", "convert"]


def evict(store: Store, artifacts: dict[str, Artifact], *names: str) -> None:
    for name in names:
        with store.lock(artifacts[name].key):
            store.evict(artifacts[name].stage, artifacts[name].key)


def test_a_run_leaves_evicted_intermediates_alone_and_makes_only_what_a_step_needs(
    pipeline: Pipeline, store: Store, run: Run
) -> None:
    done, executed = run(pipeline)
    assert executed == [step.name for step in pipeline.steps]
    evict(store, done, *INTERMEDIATES, "quantize baseline", "convert baseline")
    again, executed = run(pipeline)
    assert executed == []
    assert {name for name, artifact in again.items() if artifact.evicted} == {
        *INTERMEDIATES,
        "quantize baseline",
        "convert baseline",
    }
    assert {name: made.digest for name, made in again.items()} == {
        name: made.digest for name, made in done.items()
    }

    flip(done["evaluate pruned story"].path / "perplexity.json")  # reads `save`, which reads all before it
    again, executed = run(pipeline)
    assert executed == [*INTERMEDIATES[:5], "evaluate pruned story"]
    assert again["quantize"].evicted
    assert again["evaluate pruned story"].digest == done["evaluate pruned story"].digest


def test_an_evicted_artifact_that_comes_out_differently_gives_what_follows_new_keys(
    pipeline: Pipeline, store: Store, run: Run
) -> None:
    upto = replace(pipeline, steps=[step for step in pipeline.steps if step.name in INTERMEDIATES])
    done, _ = run(upto)
    evict(store, done, "fetch calibration", "capture")
    tombstone = store.tombstone("capture", done["capture"].key) / "manifest.json"
    pretend(tombstone, "0" * 64)  # as if made on another kind of machine
    again, executed = run(upto)
    assert executed == ["fetch calibration", "capture"]  # with the true digest, what follows is found again
    assert again["convert"].digest == done["convert"].digest
    assert not again["capture"].evicted


def pretend(manifest: Path, digest: str) -> None:
    """Give a manifest another digest, with a checksum that fits."""
    content = {name: value for name, value in read_json(manifest).items() if name != "checksum"} | {
        "digest": digest
    }
    manifest.chmod(0o644)
    manifest.write_text(json.dumps({**content, "checksum": digest_json(content)}))


def test_intermediates_of_what_is_published_can_go_and_publishing_holds(
    pipeline: Pipeline, store: Store, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'never made.db'}")
    done, _ = run(pipeline)
    refers = gc.references(store, keep_runs=DAY)
    assert {artifact.key for artifact in done.values()} == set(refers.keys)
    assert collect(store, refers, older_than=0).removed == []
    gone = collect(store, refers, older_than=0, intermediates=True).removed
    assert {removal.name.rsplit(" ", 1)[0] for removal in gone if removal.kind == "artifact"} == {
        step.name for step in pipeline.steps if step.stage.intermediate
    }
    assert run(pipeline)[1] == []
    (pipeline.recipe.publish.folder / "tiny" / "config.json").unlink()
    assert run(pipeline)[1] == [*INTERMEDIATES, "publish"]
