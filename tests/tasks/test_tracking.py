"""MLflow holds one run per pipeline, with parameters, metrics and datasets, and a registry of what was published."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camera.digests import canonical_json, digest_json
from camera.errors import CameraError
from camera.files import write_json
from tasks import registry
from tasks.registry import LINEAGE_TAG
from tasks.runs import KEY_TAG, flatten
from tasks.store import Artifact, Store
from tasks.tracking import Tracker
from tests.tasks.conftest import MakeRecipe


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return tmp_path / "mlflow artifacts"


@pytest.fixture
def track(database: str, artifacts: Path, request: pytest.FixtureRequest) -> Callable[..., Tracker]:
    """Begin or continue the run of a key; every test has an experiment of its own."""

    def begin(key: str = "key") -> Tracker:
        return Tracker(request.node.name, key, "tiny", artifacts)

    return begin


def client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def runs(tracker: Tracker) -> list[Any]:
    return list(client().search_runs([tracker.experiment_id]))


def artifact(store: Store, metrics: dict[str, float], key: str = "k", **files: Any) -> Artifact:
    def fill(folder: Path) -> dict[str, float]:
        (folder / "data").write_bytes(b"12345")
        for name, content in files.items():
            write_json(folder / f"{name}.json", content)
        return metrics

    return store.make("stage", key, fill, {"version": 1}, {}, resumes=False)


Track = Callable[..., Tracker]


def test_a_pipeline_key_has_one_run(track: Track) -> None:
    first, again, other = track("key"), track("key"), track("another key")
    assert first.run_id == again.run_id
    assert other.run_id != first.run_id
    assert {run.data.tags[KEY_TAG] for run in runs(first)} == {"key", "another key"}
    assert len(runs(first)) == 2


def test_a_run_is_named_and_its_files_lie_below_the_projects_folder(track: Track, artifacts: Path) -> None:
    tracker = track()
    [run] = runs(tracker)
    assert run.info.run_name == "tiny"
    assert run.info.artifact_uri.startswith(artifacts.as_uri())
    file = artifacts.parent / "report.html"
    file.write_text("<html>")
    tracker.log_file(file)
    assert [path.read_text() for path in artifacts.rglob("report.html")] == ["<html>"]


def test_a_run_that_a_kill_left_open_is_continued_and_closed(track: Track) -> None:
    killed = track()
    assert runs(killed)[0].info.status == "RUNNING"
    again = track()
    again.finish("FINISHED")
    [run] = runs(again)
    assert run.info.run_id == killed.run_id
    assert run.info.status == "FINISHED"
    assert run.info.end_time is not None


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "FINISHED"])
def test_a_run_that_ended_is_open_again_while_it_goes_on(track: Track, status: str) -> None:
    track().finish(status)
    assert runs(track())[0].info.status == "RUNNING"


def test_the_recipe_is_logged_flat_and_as_tags(track: Track, recipe: MakeRecipe) -> None:
    tracker = track()
    tracker.log_recipe(recipe().model_dump(mode="json"), {"camera.recipe": "tiny"})
    [run] = runs(tracker)
    assert run.data.params["prune.ratio"] == "0.35"
    assert run.data.params["calibration.samples"] == "3"
    assert run.data.params["evaluate.max_windows"] == "2"
    assert run.data.params["benchmark.decode"] == "[2]"
    assert run.data.tags["camera.recipe"] == "tiny"


def test_parameters_are_logged_once_and_stay(track: Track) -> None:
    track().log_recipe({"prune": {"ratio": 0.2}}, {"prefect.flow_run": "first"})
    again = track()
    again.log_recipe(
        {"prune": {"ratio": 0.2, "mode": "mask"}, "model": "elsewhere"}, {"prefect.flow_run": "2nd"}
    )
    again.log_recipe({"prune": {"ratio": 0.9}}, {})  # within one run, too
    [run] = runs(again)
    assert run.data.params == {"prune.ratio": "0.2", "prune.mode": "mask", "model": "elsewhere"}
    assert run.data.tags["prefect.flow_run"] == "2nd"


def test_parameters_that_mlflow_would_refuse_are_mended(track: Track) -> None:
    tracker = track()
    tracker.log_recipe({"overrides": {"*.down_proj.weight": "q8_0"}, "long": "x" * 7000, "empty": {}}, {})
    [run] = runs(tracker)
    assert run.data.params["overrides._.down_proj.weight"] == "q8_0"
    assert run.data.params["long"] == "x" * 6000


def test_a_stage_is_logged_with_its_metrics_time_and_size(track: Track, store: Store) -> None:
    tracker = track()
    made = artifact(store, {"perplexity": 12.5})
    tracker.log_stage("evaluate pruned+quantized wiki text", made, cached=False)
    [run] = runs(tracker)
    name = "evaluate/pruned_quantized/wiki/text"
    assert run.data.metrics == {
        f"{name}/perplexity": 12.5,
        f"{name}/seconds": made.seconds,
        f"{name}/size_bytes": 5,
    }
    assert run.data.tags[f"camera.digest.{name}"] == made.digest


def test_metrics_with_names_that_mlflow_would_refuse_are_cleaned(track: Track, store: Store) -> None:
    tracker = track()
    made = artifact(store, {"pruned+quantized.llama.cpp.256.decode_ms (median)": 1.0})
    tracker.log_stage("benchmark", made, cached=False)
    assert "benchmark/pruned_quantized.llama.cpp.256.decode_ms _median_" in runs(tracker)[0].data.metrics


def test_metrics_per_layer_become_steps(track: Track, store: Store) -> None:
    tracker = track()
    values = [0.9, 0.8, 0.7]
    metrics = {f"importance_kept.layer_{layer:03d}": value for layer, value in enumerate(values)}
    tracker.log_stage("prune", artifact(store, {**metrics, "kept_width": 128}), cached=False)
    history = client().get_metric_history(tracker.run_id, "prune/importance_kept")
    assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)] == [
        (0, 0.9),
        (1, 0.8),
        (2, 0.7),
    ]
    assert runs(tracker)[0].data.metrics["prune/kept_width"] == 128


def test_a_thousand_metrics_and_more_are_logged(track: Track, store: Store) -> None:
    tracker = track()
    made = artifact(store, {f"x.layer_{layer}": float(layer) for layer in range(1100)})
    tracker.log_stage("prune", made, cached=False)
    assert len(client().get_metric_history(tracker.run_id, "prune/x")) == 1100


def test_a_cached_stage_is_logged_once_in_every_run_that_uses_it(track: Track, store: Store) -> None:
    made = artifact(store, {"loss": 1.0})
    first = track("first")
    first.log_stage("score", made, cached=False)
    first.log_stage("score", made, cached=True)
    assert len(client().get_metric_history(first.run_id, "score/loss")) == 1
    second = track("second")
    second.log_stage("score", made, cached=True)
    assert client().get_run(second.run_id).data.metrics["score/loss"] == 1.0


DATASET = {"name": "wikitext2", "split": "test", "revision": "abc", "purpose": "evaluation"}
DATASET |= {"sequences": 1, "tokens": 77}


def test_a_dataset_is_an_input_with_its_digest(track: Track, store: Store) -> None:
    tracker = track()
    made = artifact(store, {}, dataset=DATASET)
    tracker.log_dataset(made)
    tracker.log_dataset(made)  # as when a run is continued
    [given] = client().get_run(tracker.run_id).inputs.dataset_inputs
    assert given.dataset.name == "wikitext2-test"
    assert len(given.dataset.digest) <= 36
    assert made.digest.startswith(given.dataset.digest)
    assert "abc" in given.dataset.source
    assert "77" in given.dataset.profile
    tags = {tag.key: tag.value for tag in given.tags}
    assert tags == {"mlflow.data.context": "evaluation", "camera.sha256": made.digest}


def lineage(word: str) -> dict[str, Any]:
    content = {"files": {"tiny.gguf": f"sha256 of {word}", "config.json": "x"}}
    return {**content, "digest": digest_json(content)}


DVC = {"dvc_file": "published/tiny.dvc", "md5": "abc.dir", "pushed_to": "box", "push_error": None}


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registry name of the test's own."""
    return f"model-{request.node.name}"


def test_a_publication_becomes_a_version_with_digests_and_an_alias(
    track: Track, name: str, tmp_path: Path
) -> None:
    run_id = track().run_id
    found = registry.register(name, tmp_path, lineage("one"), DVC, "candidate", run_id)
    assert found == {"name": name, "version": "1", "alias": "candidate"}
    version = client().get_model_version_by_alias(name, "candidate")
    assert (str(version.version), version.run_id, version.source) == ("1", run_id, tmp_path.as_uri())
    assert version.tags == {
        LINEAGE_TAG: lineage("one")["digest"],
        "camera.folder": str(tmp_path),
        "dvc.file": "published/tiny.dvc",
        "dvc.md5": "abc.dir",
        "sha256.tiny.gguf": "sha256 of one",
        "camera.lineage": canonical_json(lineage("one")),
    }


def test_registering_the_same_publication_twice_is_one_version(
    track: Track, name: str, tmp_path: Path
) -> None:
    run_id = track().run_id
    first = registry.register(name, tmp_path, lineage("one"), None, "candidate", run_id)
    assert registry.register(name, tmp_path, lineage("one"), None, "candidate", run_id) == first
    assert len(client().search_model_versions(f"name = '{name}'")) == 1


def test_the_alias_moves_to_the_newest_publication(track: Track, name: str, tmp_path: Path) -> None:
    run_id = track().run_id
    for word in ("one", "two"):
        registry.register(name, tmp_path, lineage(word), None, "candidate", run_id)
    assert str(client().get_model_version_by_alias(name, "candidate").version) == "2"
    registry.register(name, tmp_path, lineage("one"), None, "candidate", run_id)
    assert str(client().get_model_version_by_alias(name, "candidate").version) == "3"
    newest = registry.find_version(name)  # what lies in the folder again
    assert (newest.number, newest.lineage_digest) == (3, lineage("one")["digest"])


def test_no_run_gives_a_model_the_alias_production(track: Track, name: str, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="camera promote"):
        registry.register(name, tmp_path, lineage("one"), None, "production", track().run_id)
    assert client().search_registered_models(f"name = '{name}'") == []


@pytest.mark.parametrize("kind", ["no address", "folder", "unknown"])
def test_a_database_that_cannot_be_used_is_a_message_that_says_what_to_do(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = {
        "no address": "http://127.0.0.1:99999",
        "folder": str(tmp_path / "mlruns"),
        "unknown": "carrier-pigeon://roof",
    }[kind]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(CameraError, match=r"MLflow at .* cannot be used: ") as caught:
        Tracker("experiment", "key", "tiny", tmp_path)
    assert uri in str(caught.value)
    assert "--set tracking.enabled=false" in str(caught.value)


def test_a_file_that_is_no_database_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"no database at all, " * 100)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(path).execute("select 1 from x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_CREATE_RETRIES", "0")
    with pytest.raises(CameraError, match="cannot be used"):
        Tracker("experiment", "key", "tiny", tmp_path)


def test_a_database_in_a_folder_that_is_not_there_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'gone' / 'mlflow.db'}")
    started = time.monotonic()
    with pytest.raises(CameraError, match="gone does not exist"):
        Tracker("experiment", "key", "tiny", tmp_path)
    assert time.monotonic() - started < 10  # MLflow itself tries for 100 s


def test_an_experiment_that_was_deleted_stops_the_run_at_once_and_says_how_to_restore_it(
    track: Track, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    number = track().experiment_id
    client().delete_experiment(number)
    with pytest.raises(CameraError, match="was deleted") as caught:
        track()
    command = f"MLFLOW_TRACKING_URI={database} mlflow experiments restore --experiment-id {number}"
    assert command in str(caught.value)
    assert "goes on" not in caplog.text
    client().restore_experiment(number)
    assert track().experiment_id == number


def test_a_model_name_that_mlflow_refuses_is_a_message(track: Track, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="MLflow refuses the model name"):
        registry.register("", tmp_path, lineage("one"), None, "candidate", track().run_id)


def test_nested_mappings_are_flattened_with_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None, "f": {}}) == {
        "a.b.c": 1,
        "a.d": [2],
        "e": None,
    }


def test_once_the_run_is_there_what_cannot_be_recorded_is_a_warning(
    track: Track, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    tracker = track()
    made = artifact(store, {"loss": 1.0})
    good, tracker._client = tracker._client, MlflowClient(f"sqlite:///{tmp_path}/gone/mlflow.db")
    tracker.log_recipe({"prune": {"ratio": 0.2}}, {})
    tracker.log_stage("score", made, cached=False)
    tracker.log_file(made.path / "data")
    tracker.finish("FINISHED")
    for name in ("log_recipe", "log_stage", "log_file", "finish"):
        assert f"MLflow did not take {name}" in caplog.text
    tracker._client = good
    tracker.log_stage("score", made, cached=True)  # the same recipe run again delivers it
    [run] = runs(tracker)
    assert run.data.metrics["score/loss"] == 1.0
