"""A run tells its listener of every step, records itself in MLflow, and closes what it opened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camera.errors import CameraError
from tasks.pipeline import Pipeline, build_pipeline
from tasks.project import Project
from tasks.run import Outcome, run_pipeline
from tasks.sources import find_sources
from tasks.stage import Request, find, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import MakeRecipe, Quiet

STEPS = ["fetch calibration", "capture", "score", "prune", "save", "quantize", "convert"]
STEPS += ["quantize baseline", "convert baseline", "fetch story"]
STEPS += [f"evaluate {model} story" for model in ("original", "baseline", "pruned", "pruned+quantized")]
STEPS += ["benchmark", "report"]


@pytest.fixture
def short(recipe: MakeRecipe, request: pytest.FixtureRequest) -> Callable[..., Pipeline]:
    """The pipeline of a recipe that does not publish, in an experiment of its own."""

    def make(**sections: Any) -> Pipeline:
        tracking = {"enabled": True, "experiment": request.node.name}
        plain: dict[str, Any] = {
            "evaluate": {"window": 16, "max_windows": 1},
            "publish": {"enabled": False},
        }
        checked = recipe(**{**plain, "tracking": tracking, **sections})
        return build_pipeline(checked, find_sources(checked))

    return make


Short = Callable[..., Pipeline]
Perform = Callable[[Request], tuple[Artifact, bool]]


@pytest.fixture
def performed(store: Store) -> Perform:
    def direct(request: Request) -> tuple[Artifact, bool]:
        cached = find(store, request) is not None
        return perform(store, request), cached

    return direct


def failing_at(step: str, performed: Perform, error: BaseException) -> Perform:
    def perform_or_fail(request: Request) -> tuple[Artifact, bool]:
        if request.step == step:
            raise error
        return performed(request)

    return perform_or_fail


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "home")


def client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def runs(pipeline: Pipeline) -> list[Any]:
    experiment = client().get_experiment_by_name(pipeline.recipe.tracking.experiment)
    return list(client().search_runs([experiment.experiment_id]))


def test_a_run_executes_all_then_nothing(
    database: str, short: Short, performed: Perform, project: Project
) -> None:
    first, told = run_pipeline(short(), performed, project, quiet := Quiet()), quiet.told
    assert first.executed == STEPS
    assert told == [("begin", "tiny"), *(("finished", step) for step in STEPS)]
    assert first.report.is_file()
    assert first.gguf.name == "tiny-q4_0_64.gguf"
    assert first.published is None

    second, told = run_pipeline(short(), performed, project, quiet := Quiet()), quiet.told
    assert second.executed == []
    assert told == [("begin", "tiny"), *(("cached", step) for step in STEPS)]
    assert second.mlflow_run == first.mlflow_run
    [run] = runs(short())
    assert run.info.status == "FINISHED"
    assert run.data.tags["camera.recipe"] == "tiny"
    assert {name for name in run.data.metrics if name.endswith("/seconds")} == {
        f"{step.replace(' ', '/').replace('+', '_')}/seconds" for step in STEPS
    }
    files = [file.path for file in client().list_artifacts(run.info.run_id)]
    assert sorted(files) == ["report.html", "results.json"]
    expects_inputs_in_every_run(short, performed, project)


def expects_inputs_in_every_run(short: Short, performed: Perform, project: Project) -> None:
    """Another recipe on the same text fetches nothing anew, and its run says all the same what it read."""
    other = short(name="other")
    outcome: Outcome = run_pipeline(other, performed, project, Quiet())
    assert "fetch calibration" not in outcome.executed
    found = {run.info.run_name: run.inputs.dataset_inputs for run in runs(other)}
    assert set(found) == {"tiny", "other"}
    read = [outcome.artifacts[step].digest[:36] for step in ("fetch calibration", "fetch story")]
    for inputs in found.values():
        assert sorted(given.dataset.digest for given in inputs) == sorted(read)


@pytest.mark.parametrize(
    ("error", "status"),
    [(CameraError("calibration is too short"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
    ids=["error", "interruption"],
)
def test_a_run_that_stops_is_told_closed_and_continued(
    database: str, short: Short, performed: Perform, project: Project, error: BaseException, status: str
) -> None:
    listener = Quiet()
    with pytest.raises(type(error)):
        run_pipeline(short(), failing_at("prune", performed, error), project, listener)
    assert listener.told[-1] == ("failed", "prune")
    [run] = runs(short())
    assert run.info.status == status
    with pytest.raises(type(error)):
        run_pipeline(short(), failing_at("save", performed, error), project, listener := Quiet())
    assert listener.told == [
        ("begin", "tiny"),
        ("cached", "fetch calibration"),
        ("cached", "capture"),
        ("cached", "score"),
        ("finished", "prune"),
        ("failed", "save"),
    ]
    [again] = runs(short())
    assert again.info.run_id == run.info.run_id


def test_a_run_can_go_untracked(
    short: Short, performed: Perform, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    pipeline = short(tracking={"enabled": False})
    with pytest.raises(CameraError, match="stop here"):
        run_pipeline(pipeline, failing_at("score", performed, CameraError("stop here")), project, Quiet())
    assert [path.name for path in project.home.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:99999", "carrier-pigeon://roof"], ids=["no address", "no such scheme"]
)
def test_a_tracking_address_that_is_wrong_stops_the_run_before_any_work(
    short: Short,
    performed: Perform,
    project: Project,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(CameraError, match=r"MLflow at .* cannot be used.*tracking.enabled=false"):
        run_pipeline(short(), performed, project, Quiet())
    assert not store.root.exists()


def test_a_server_that_is_away_leaves_a_run_whose_tracking_is_pending(
    short: Short,
    performed: Perform,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:a-password@127.0.0.1:9")
    outcome = run_pipeline(short(), performed, project, Quiet())
    assert outcome.executed == STEPS
    assert outcome.mlflow_run is None
    assert "MLflow at http://***@127.0.0.1:9 cannot be used" in str(outcome.mlflow_pending)
    assert "Tracking is pending, and the run goes on" in caplog.text
    assert "MLflow lacks this run; run the recipe again to deliver it" in caplog.text
    assert "a-password" not in caplog.text
