"""The runs that MLflow holds: for tables, for the audit, and for what must stay in the store."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from camera.secrets import without_secrets
from tasks.mlflow_client import QUOTED, mlflow_client, pages

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

KEY_TAG = "camera.pipeline_key"
KEEP_TAG = "camera.keep"
DIGEST_TAG = "camera.digest."
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")
_PARAMETER_LENGTH = 6000


@dataclass(frozen=True)
class Run:
    """One run of a pipeline, as MLflow has it."""

    run_id: str
    name: str
    experiment: str
    status: str
    started: datetime
    ended: datetime | None
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @property
    def digests(self) -> dict[str, str]:
        """Content digest of every artifact, by step as MLflow spells it."""
        found = self.tags.items()
        return {tag.removeprefix(DIGEST_TAG): value for tag, value in found if tag.startswith(DIGEST_TAG)}

    @property
    def seconds(self) -> float | None:
        """From start to end; a run that was continued counts from its first start."""
        return None if self.ended is None else (self.ended - self.started).total_seconds()


def list_runs(limit: int | None = None, name: str | None = None) -> list[Run]:
    """The pipeline's runs, newest first; those that were deleted in MLflow are left out.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    with mlflow_client() as client:
        if client is None:
            return []
        experiments = {entry.experiment_id: entry.name for entry in pages(client.search_experiments)}
        condition = f"tags.`{KEY_TAG}` != ''"
        plain = name is not None and not QUOTED.search(name)
        if plain:
            condition += f" AND attributes.run_name = '{name}'"
        found = pages(
            client.search_runs,
            limit if name is None or plain else None,
            experiment_ids=list(experiments),
            filter_string=condition,
            order_by=["attributes.start_time DESC"],
        )
        ours = (entry for entry in found if name in (None, entry.info.run_name))
        return [_run(entry, experiments[entry.info.experiment_id]) for entry in islice(ours, limit)]


def find_run(run_id: str) -> Run | None:
    """A run by its id, or None if the tracking database in use has no such run.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_client() as client:
        if client is None:
            return None
        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return _run(found, client.get_experiment(found.info.experiment_id).name)


def kept_runs(seconds: float) -> Iterator[Run]:
    """The runs that were at work in the last so many seconds, and those tagged `camera.keep`.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    now = datetime.now(UTC)
    for run in list_runs():
        recent = (now - (run.ended or run.started)).total_seconds() < seconds
        if recent or run.tags.get(KEEP_TAG, "").lower() in ("true", "1", "yes"):
            yield run


def _run(found: "MlflowRun", experiment: str) -> Run:
    info, data = found.info, found.data
    return Run(
        run_id=str(info.run_id),
        name=str(info.run_name),
        experiment=experiment,
        status=str(info.status),
        started=_time(info.start_time),
        ended=_time(info.end_time) if info.end_time else None,
        parameters=dict(data.params),
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def allowed(name: str) -> str:
    """A name without the characters that MLflow refuses."""
    return _NOT_ALLOWED.sub("_", name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return flat


def mlflow_name(step: str) -> str:
    """A step's name as MLflow's tags and metrics have it."""
    return allowed(step).replace(" ", "/")


def parameter(name: str, value: Any) -> tuple[str, str]:
    """A field of a recipe as MLflow holds it; overrides of quantize have patterns as names."""
    return allowed(name), without_secrets(str(value))[:_PARAMETER_LENGTH]
