"""MLflow: one run per pipeline key, continued after a kill and never doubled, and the registry of published models.

MLflow owns parameters, metrics, the datasets used, and the files that people look at. Checkpoints are not uploaded:
the registry's versions point to the published folder, tagged with its digests.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from camera.digests import canonical_json
from camera.errors import CameraError, NetworkError
from camera.files import read_json
from camera.secrets import without_secrets
from tasks.abandoned import PROCESS_TAG, close_abandoned, this_process
from tasks.runs import KEY_TAG, connect
from tasks.store import Artifact
from tasks.tracking_server import Patience, check_server, is_server, patience_with, says_nothing

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Arguments = ParamSpec("Arguments")
_log = logging.getLogger("camera.tracking")
LINEAGE_TAG = "camera.lineage_digest"
DOCUMENT_TAG = "camera.lineage"
"""On a registry version: the whole lineage.json, as canonical JSON; left out if it is longer than MLflow takes."""
FOLDER_TAG = "camera.folder"
DVC_TAG = "dvc.md5"
SHA256_TAG = "sha256."
"""Before the name of a GGUF file."""
PRODUCTION = "production"
"""The alias that only `camera promote` gives."""
_TAG_LENGTH = 100_000
_PER_LAYER = re.compile(r"(.+)\.layer_(\d+)")
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")
_DATASET_DIGEST_LENGTH = 36  # MLflow cuts longer ones; the whole sha256 is in a tag
_PARAMETER_LENGTH = 6000


def _going_on(record: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Make a recording that fails a warning: a night's work does not end because a server is down.

    It is kept, and delivered as soon as the server answers again, at the latest when the run ends.
    """

    @wraps(record)
    def recording(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        tracker = arguments[0]
        assert isinstance(tracker, Tracker)
        tracker.deliver(record.__name__, partial(record, *arguments, **named))

    return recording


class Tracker:
    """The MLflow run of one pipeline.

    What cannot be recorded, be it the run itself, is a warning; the same recipe run again records it.
    """

    run_id: str | None = None
    """None while the server has not yet answered."""
    experiment_id: str | None = None

    def __init__(self, experiment: str, pipeline_key: str, name: str, artifacts: Path) -> None:
        """Find the run of this key, or create it; a run that a kill left open is continued.

        A server that is away is waited for while the run goes on: a night's work is worth more than its record.

        Raises:
            CameraError: if waiting would not help: a database that cannot be used, an address that is none, a server
                that refuses (a wrong password, say).
        """
        self._uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._patience = patience_with(self._uri) if is_server(self._uri) else Patience()
        self._undelivered: list[tuple[str, Callable[[], None]]] = []
        self._failure: Exception | None = None
        self._logged: dict[str, str] = {}
        now = int(time.time() * 1000)
        self._undelivered.append(
            ("the run", partial(self._begin, experiment, pipeline_key, name, artifacts, now))
        )
        self.catch_up()
        if self._failure is not None and not (is_server(self._uri) and says_nothing(self._failure)):
            raise CameraError(f"{self.pending}. Mend it, or run with --set tracking.enabled=false")
        if self.pending is not None and self._failure is None:
            _log.warning("%s. Tracking is pending, and the run goes on", self.pending)

    def _begin(self, experiment: str, pipeline_key: str, name: str, artifacts: Path, started: int) -> None:
        self._client = connect()
        self.experiment_id = _experiment(self._client, experiment, artifacts)
        found = self._client.search_runs(
            [self.experiment_id], f"tags.`{KEY_TAG}` = '{pipeline_key}'", max_results=1
        )
        if found:
            run_id = str(found[0].info.run_id)
            self._logged = dict(found[0].data.params)
        else:
            tags = {KEY_TAG: pipeline_key}
            created = self._client.create_run(self.experiment_id, started, tags, name)
            run_id = str(created.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, PROCESS_TAG, this_process())
        close_abandoned(self._client, self.experiment_id)
        self.run_id = run_id

    @property
    def pending(self) -> str | None:
        """Why MLflow lacks what was to be recorded, in words; None if it has all."""
        if not self._undelivered:
            return None
        said = "it did not answer a moment ago" if self._failure is None else str(self._failure)
        return without_secrets(f"MLflow at {self._uri} cannot be used: {said}")

    @_going_on
    def log_recipe(self, recipe: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record the recipe as flat parameters, and tags."""
        from mlflow.entities import Param, RunTag

        flat = dict(parameter(name, value) for name, value in flatten(recipe).items())
        new = [Param(name, value) for name, value in flat.items() if name not in self._logged]
        self._client.log_batch(
            self._run, params=new, tags=[RunTag(name, value) for name, value in tags.items()]
        )

    @_going_on
    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        from mlflow.entities import RunTag

        self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in tags.items()])

    @_going_on
    def measure(self, metrics: Mapping[str, float]) -> None:
        """Record numbers of the run as a whole."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()]
        )

    @_going_on
    def log_stage(self, step: str, artifact: Artifact, cached: bool) -> None:
        """Record what a stage measured, how long it took and how big it is; nothing new for a cached one."""
        from mlflow.entities import Metric, RunTag

        prefix = spelled(step)
        self._client.log_batch(self._run, tags=[RunTag(f"camera.digest.{prefix}", artifact.digest)])
        if cached and self._has(f"{prefix}/seconds"):
            return
        now = int(time.time() * 1000)
        metrics = [Metric(f"{prefix}/seconds", artifact.seconds, now, 0)]
        metrics.append(Metric(f"{prefix}/size_bytes", artifact.size_bytes, now, 0))
        for name, value in artifact.metrics.items():
            layered = _PER_LAYER.fullmatch(name)
            clean = _NOT_ALLOWED.sub("_", layered[1] if layered else name)
            metrics.append(Metric(f"{prefix}/{clean}", value, now, int(layered[2]) if layered else 0))
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    @_going_on
    def log_dataset(self, artifact: Artifact) -> None:
        """Record tokens that were fetched as a dataset input with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        described = read_json(artifact.path / "dataset.json")
        label = f"{described['name']}-{described['split']}"
        source = {"source": label, "revision": described.get("revision"), "python": described.get("python")}
        dataset = Dataset(
            name=label,
            digest=artifact.digest[:_DATASET_DIGEST_LENGTH],
            source_type="camera",
            source=str(source),
            profile=str({"sequences": described["sequences"], "tokens": described["tokens"]}),
        )
        tags = [
            InputTag("mlflow.data.context", described["purpose"]),
            InputTag("camera.sha256", artifact.digest),
        ]
        self._client.log_inputs(self._run, [DatasetInput(dataset, tags)])

    @_going_on
    def log_file(self, path: Path) -> None:
        """Record a file that people look at."""
        self._client.log_artifact(self._run, str(path))

    def finish(self, status: str) -> None:
        """Deliver what could not be recorded before, and close the run: FINISHED, FAILED or KILLED."""
        self._undelivered.append(("finish", lambda: self._client.set_terminated(self._run, status)))
        self.catch_up()
        if self._undelivered:
            lacking = "this run" if self.run_id is None else f"{len(self._undelivered)} records of this run"
            _log.warning("tracking is pending: MLflow lacks %s; run the recipe again to deliver it", lacking)

    def deliver(self, what: str, record: Callable[[], None]) -> None:
        """Record something after all that is still to be recorded; it is kept while MLflow cannot be used."""
        self._undelivered.append((what, record))
        if self._patience.may_ask(urgent=False):
            self._ask()

    def catch_up(self) -> None:
        """Deliver now what could not be recorded before, if MLflow can be used; where there may be no later time."""
        if self._undelivered and self._patience.may_ask(urgent=True):
            self._ask()

    def _ask(self) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with self._patience.asking():
                check_server(self._uri)
                while self._undelivered:
                    self._record(*self._undelivered[0])
                    self._undelivered.pop(0)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            level = logging.INFO if str(error) == str(self._failure) else logging.WARNING  # said already
            self._failure = error
            _log.log(
                level, "%s. Tracking is pending, and the run goes on; MLflow is asked again", self.pending
            )
        else:
            if self._failure is not None:
                _log.warning("MLflow answers again, and has all that was recorded meanwhile")
            self._failure = None

    def _record(self, what: str, record: Callable[[], None]) -> None:
        """Record one thing; that MLflow refuses it is a warning, unless it is the run itself."""
        from mlflow.exceptions import MlflowException

        try:
            record()
        except MlflowException as error:
            if self.run_id is None or says_nothing(error):
                raise
            said = without_secrets(str(error))
            _log.warning("MLflow did not take %s (%s); run the recipe again to deliver it", what, said)

    @property
    def _run(self) -> str:
        assert self.run_id is not None  # the run is the first thing delivered
        return self.run_id

    def _has(self, metric: str) -> bool:
        return metric in self._client.get_run(self._run).data.metrics


def register(
    name: str,
    folder: Path,
    lineage: Mapping[str, Any],
    dvc: Mapping[str, Any] | None,
    alias: str,
    run_id: str,
) -> dict[str, str]:
    """Make a registry version of a published folder (or find the one it has) and point the alias to it.

    The registry accepts any source without looking; call this for verified folders only.

    Returns:
        name, version and alias.

    Raises:
        CameraError: if the alias is `production`, which only `camera promote` gives, or MLflow refuses the name.
        NetworkError: if the registry cannot be used.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if alias == PRODUCTION:
        raise CameraError(
            f"publish.alias: {PRODUCTION} is given by `camera promote {name}`, after an audit; choose another"
        )
    try:
        return _register(name, folder, lineage, dvc, alias, run_id)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise NetworkError(without_secrets(f"MLflow's registry cannot be used: {error}")) from error


def _register(
    name: str,
    folder: Path,
    lineage: Mapping[str, Any],
    dvc: Mapping[str, Any] | None,
    alias: str,
    run_id: str,
) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    client = connect()
    digest = lineage["digest"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise CameraError(f"MLflow refuses the model name {name}: {error}") from None
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get(LINEAGE_TAG) == digest
    ]
    tags = {LINEAGE_TAG: digest, FOLDER_TAG: str(folder)}
    if len(document := canonical_json(lineage)) <= _TAG_LENGTH:
        tags[DOCUMENT_TAG] = document
    if dvc is not None:
        tags |= {"dvc.file": dvc["dvc_file"], DVC_TAG: dvc["md5"]}
    for file, sha256 in lineage["files"].items():
        if file.endswith(".gguf"):
            tags[SHA256_TAG + file] = sha256
    # A server refuses folders that it does not manage; the folder is in a tag in either case.
    source = folder.as_uri() if _is_local() else f"runs:/{run_id}"
    version = found[0] if found else client.create_model_version(name, source, run_id, tags=tags)
    client.set_registered_model_alias(name, alias, version.version)
    return {"name": name, "version": str(version.version), "alias": alias}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def spelled(step: str) -> str:
    """A step's name as MLflow's tags and metrics have it."""
    return _NOT_ALLOWED.sub("_", step).replace(" ", "/")


def parameter(name: str, value: Any) -> tuple[str, str]:
    """A field of a recipe as MLflow holds it; overrides of quantize have patterns as names."""
    return _NOT_ALLOWED.sub("_", name), without_secrets(str(value))[:_PARAMETER_LENGTH]


def _experiment(client: "MlflowClient", name: str, artifacts: Path) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = (artifacts / name).as_uri() if _is_local() else None  # a server decides for itself
    return str(client.create_experiment(name, artifact_location=location))


def _is_local() -> bool:
    """Whether MLflow is a database that this process opens, and no server."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").startswith("sqlite:")
