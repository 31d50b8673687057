"""MLflow: one run per pipeline key, continued after a kill and never doubled.

MLflow owns parameters, metrics, the datasets used, and the files that people look at. Checkpoints are not uploaded:
the registry's versions (tasks/registry.py) point to the published folder, tagged with its digests.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from camera.errors import CameraError
from camera.files import read_json
from camera.processes import has_ended, process_identity
from camera.secrets import without_secrets
from tasks.busy_database import is_busy
from tasks.mlflow_client import (
    Backoff,
    ExperimentDeleted,
    ServerUnavailable,
    backoff_of,
    check_server,
    connect,
    database_of,
    in_short,
    is_server,
    is_transient,
    pages,
    tracking_uri,
)
from tasks.recipe import TrackingOptions
from tasks.runs import KEY_TAG, allowed, flatten, mlflow_name, parameter
from tasks.store import Artifact

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

Arguments = ParamSpec("Arguments")
_log = logging.getLogger("camera.tracking")
PROCESS_TAG = "camera.process"
"""Of a run: identity of the process that works on it."""
_PER_LAYER = re.compile(r"(.+)\.layer_(\d+)")
_DATASET_DIGEST_LENGTH = 36  # MLflow cuts longer ones; the whole sha256 is in a tag
_BATCH = 1000  # MLflow's limit
_PENDING = "%s. Tracking is pending, and the run goes on; it is tried again"


def _queued(
    record: Callable[Concatenate["Tracker", Arguments], None],
) -> Callable[Concatenate["Tracker", Arguments], None]:
    """Make a method put its recording into the outbox, which is delivered at once if MLflow can be used."""

    @wraps(record)
    def queue(tracker: "Tracker", /, *arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        tracker._outbox.append((record.__name__, partial(record, tracker, *arguments, **named)))
        tracker._deliver(urgent=False)

    return queue


class Tracker:
    """The MLflow run of one pipeline, and an outbox of what MLflow could not take yet.

    A server that is away costs a warning: a night's work is worth more than its record. What is still in the outbox
    at the end is recorded when the same recipe runs again.
    """

    run_id: str | None = None
    """None while the server has not yet answered."""
    experiment_id: str | None = None
    failed: bool = False
    """Whether the run is closed as FAILED although it came to its end."""

    def __init__(self, experiment: str, pipeline_key: str, name: str, artifacts: Path) -> None:
        """Find the run of this key, or create it; a run that a kill left open is continued.

        Raises:
            CameraError: if waiting would not help: a database that cannot be used, a malformed address, a server that
                refuses (a wrong password, say).
        """
        self._uri = tracking_uri()
        self._backoff = backoff_of(self._uri) if is_server(self._uri) else Backoff()
        self._failure: Exception | None = None
        self._logged: dict[str, str] = {}
        begin = partial(self._begin, experiment, pipeline_key, name, artifacts, _now())
        self._outbox: list[tuple[str, Callable[[], None]]] = [("the run", begin)]
        self._deliver(urgent=True, tell=False)
        if self._failure is not None and not self._may_pass(self._failure):
            raise CameraError(f"{self.pending}. Mend it, or run with --set tracking.enabled=false")
        if self.pending is not None:
            _log.warning(_PENDING, self.pending)

    def _may_pass(self, failure: Exception) -> bool:
        """Whether a failure to begin may be over later: a server's, or another process that holds the database."""
        return is_busy(failure) or (is_server(self._uri) and is_transient(failure))

    def _begin(self, experiment: str, pipeline_key: str, name: str, artifacts: Path, started: int) -> None:
        self._client = connect()
        self._database = self._identity()
        self.experiment_id = _experiment(self._client, experiment, artifacts)
        found = self._client.search_runs(
            [self.experiment_id], f"tags.`{KEY_TAG}` = '{pipeline_key}'", max_results=1
        )
        if found:
            run = found[0]
            self._logged = dict(run.data.params)
        else:
            run = self._client.create_run(self.experiment_id, started, {KEY_TAG: pipeline_key}, name)
        run_id = str(run.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, PROCESS_TAG, process_identity())
        close_orphaned_runs(self._client, self.experiment_id)
        self.run_id = run_id

    @property
    def pending(self) -> str | None:
        """Why MLflow lacks what was to be recorded, in words; None if it has all."""
        if not self._outbox:
            return None
        reason = "it did not answer a moment ago" if self._failure is None else in_short(self._failure)
        return without_secrets(f"MLflow at {self._uri} cannot be used: {reason}")

    @_queued
    def log_recipe(self, recipe: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record the recipe as flat parameters, and tags."""
        flat = dict(parameter(name, value) for name, value in flatten(recipe).items())
        self._log(params={name: value for name, value in flat.items() if name not in self._logged}, tags=tags)

    @_queued
    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._log(tags=tags)

    @_queued
    def measure(self, metrics: Mapping[str, float]) -> None:
        """Record numbers of the run as a whole."""
        self._log([_metric(name, value) for name, value in metrics.items()])

    @_queued
    def log_stage(self, step: str, artifact: Artifact, cached: bool) -> None:
        """Record what a stage measured, how long it took and how big it is; nothing new for a cached one."""
        prefix = mlflow_name(step)
        self._log(tags={f"camera.digest.{prefix}": artifact.digest})
        if cached and f"{prefix}/seconds" in self._client.get_run(self._run).data.metrics:
            return
        metrics = [
            _metric(f"{prefix}/seconds", artifact.seconds),
            _metric(f"{prefix}/size_bytes", artifact.size_bytes),
        ]
        for name, value in artifact.metrics.items():
            layered = _PER_LAYER.fullmatch(name)
            clean = allowed(layered[1] if layered else name)
            metrics.append(_metric(f"{prefix}/{clean}", value, int(layered[2]) if layered else 0))
        for start in range(0, len(metrics), _BATCH):
            self._log(metrics[start : start + _BATCH])

    @_queued
    def log_dataset(self, artifact: Artifact) -> None:
        """Record tokens that were fetched as a dataset input with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        about = read_json(artifact.path / "dataset.json")
        label = f"{about['name']}-{about['split']}"
        dataset = Dataset(
            name=label,
            digest=artifact.digest[:_DATASET_DIGEST_LENGTH],
            source_type="camera",
            source=str({"source": label, "revision": about.get("revision"), "python": about.get("python")}),
            profile=str({"sequences": about["sequences"], "tokens": about["tokens"]}),
        )
        tags = {"mlflow.data.context": about["purpose"], "camera.sha256": artifact.digest}
        given = DatasetInput(dataset, [InputTag(name, value) for name, value in tags.items()])
        self._client.log_inputs(self._run, [given])

    @_queued
    def log_file(self, path: Path) -> None:
        """Record a file that people look at."""
        self._client.log_artifact(self._run, str(path))

    def finish(self, status: str) -> None:
        """Deliver the outbox and close the run: FINISHED, FAILED or KILLED."""
        self._outbox.append(("finish", lambda: self._client.set_terminated(self._run, status)))
        self.catch_up()
        if self._outbox:
            lacking = "this run" if self.run_id is None else f"{len(self._outbox)} records of this run"
            _log.warning("tracking is pending: MLflow lacks %s; run the recipe again to deliver it", lacking)

    def catch_up(self) -> None:
        """Deliver the outbox where there may be no later time, if MLflow can be used."""
        self._deliver(urgent=True)

    def _deliver(self, *, urgent: bool, tell: bool = True) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if not self._outbox or not self._backoff.may_try(urgent=urgent):
            return
        try:
            with self._backoff.attempt():
                check_server(self._uri)
                self._check_database()
                while self._outbox:
                    self._record(*self._outbox[0])
                    self._outbox.pop(0)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            known, self._failure = str(error) == str(self._failure), error
            if tell:
                _log.log(logging.INFO if known else logging.WARNING, _PENDING, self.pending)
        else:
            if self._failure is not None:
                _log.warning("MLflow answers again, and has all that was recorded meanwhile")
            self._failure = None

    def _identity(self) -> tuple[int, int] | None:
        """Which file the database is; None for a server, or if it is gone."""
        path = database_of(self._uri)
        try:
            found = None if path is None else path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_dev, found.st_ino)

    def _check_database(self) -> None:
        """Do not write to a file that somebody deleted, which SQLite does without a word.

        Raises:
            ServerUnavailable: if the database is not the one in which the run began.
        """
        if self.run_id is not None and self._identity() != self._database:
            raise ServerUnavailable("its database was taken away or replaced since this run began")

    def _record(self, what: str, record: Callable[[], None]) -> None:
        """Record one thing; that MLflow refuses it is a warning, unless it is the run itself."""
        from mlflow.exceptions import MlflowException

        try:
            record()
        except MlflowException as error:
            if self.run_id is None or is_transient(error):
                raise
            reason = without_secrets(str(error))
            _log.warning("MLflow did not take %s (%s); run the recipe again to deliver it", what, reason)

    def _log(
        self,
        metrics: "Sequence[Metric]" = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Param, RunTag

        self._client.log_batch(
            self._run,
            metrics=metrics,
            params=[Param(name, value) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

    @property
    def _run(self) -> str:
        assert self.run_id is not None  # the run is the first thing delivered
        return self.run_id


class Untracked:
    """What takes the records of a run that is not to be tracked."""

    run_id: str | None = None
    pending: str | None = None
    failed: bool = False

    def _ignore(self, *arguments: Any, **named: Any) -> None:
        """Nothing is recorded."""

    log_recipe = tag = measure = log_stage = log_dataset = log_file = finish = catch_up = _ignore


@contextmanager
def tracked(
    asked: TrackingOptions | None, pipeline_key: str, name: str, artifacts: Path
) -> Iterator[Tracker | Untracked]:
    """The tracker of a run, which is closed as FINISHED, FAILED or KILLED when the block ends.

    Args:
        asked: None for a run that is not to be tracked.
        pipeline_key, name, artifacts: as for `Tracker`.
    """
    tracker = Untracked() if asked is None else Tracker(asked.experiment, pipeline_key, name, artifacts)
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracker.finish("FAILED" if tracker.failed else "FINISHED")


def close_orphaned_runs(client: "MlflowClient", experiment_id: str) -> list[str]:
    """Close, as KILLED, the RUNNING runs of an experiment whose process on this host has ended; their ids.

    The same recipe run again continues such a run and closes it; this is for those that nobody runs again, because
    their recipe or their sources changed. Runs of other hosts are left alone: nothing is known of their processes.
    """
    running = "attributes.status = 'RUNNING'"
    found = pages(client.search_runs, experiment_ids=[experiment_id], filter_string=running)
    orphaned = [str(run.info.run_id) for run in found if has_ended(run.data.tags.get(PROCESS_TAG, ""))]
    for run_id in orphaned:
        client.set_terminated(run_id, "KILLED")
    return orphaned


def _experiment(client: "MlflowClient", name: str, artifacts: Path) -> str:
    if (experiment := client.get_experiment_by_name(name)) is not None:
        if experiment.lifecycle_stage == "deleted":
            number, uri = experiment.experiment_id, without_secrets(tracking_uri())
            raise ExperimentDeleted(
                f"its experiment {name!r} was deleted. `MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
                f"--experiment-id {number}` brings it back with its runs; tracking.experiment names another"
            )
        return str(experiment.experiment_id)
    # A server decides for itself where its files are.
    location = (artifacts / name).as_uri() if database_of(tracking_uri()) is not None else None
    return str(client.create_experiment(name, artifact_location=location))


def _metric(name: str, value: float, step: int = 0) -> "Metric":
    from mlflow.entities import Metric

    return Metric(name, value, _now(), step)


def _now() -> int:
    return int(time.time() * 1000)
