"""The runs that MLflow holds, read: for tables, for the audit, and for what must stay in the store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from camera.errors import CameraError, NetworkError
from camera.secrets import without_secrets
from tasks.tracking_database import database_of, ready_database
from tasks.tracking_server import check_server

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

KEY_TAG = "camera.pipeline_key"
KEEP_TAG = "camera.keep"
DIGEST_TAG = "camera.digest."
_PAGE = 500


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
    with reading() as client:
        return [] if client is None else list(_runs(client, limit, name))


def find_run(run_id: str) -> Run | None:
    """A run by its id, or None if the tracking database in use has no such run.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with reading() as client:
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


@contextmanager
def reading() -> "Iterator[MlflowClient | None]":
    """A client to read with; None where the database in use was never made. What fails says how MLflow was asked.

    Raises:
        NetworkError: if MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    database = database_of(uri)
    if database is not None and not database.exists():
        yield None
        return
    try:
        yield connect()
    except CameraError:
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise NetworkError(without_secrets(f"MLflow at {uri} cannot be asked: {error}")) from error


def connect() -> "MlflowClient":
    """A client of the tracking server or database in use.

    Raises:
        OSError: if it is an SQLite database that cannot be opened or made, or a server that does not answer within
            seconds.
    """
    from mlflow.tracking import MlflowClient  # 2.5 s; only who tracks or asks pays it

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    database = database_of(uri)
    if database is not None:
        ready_database(database)
    check_server(uri)
    return MlflowClient()


def _runs(client: "MlflowClient", limit: int | None, name: str | None) -> Iterator[Run]:
    experiments = {entry.experiment_id: entry.name for entry in _pages(client.search_experiments)}
    condition = f"tags.`{KEY_TAG}` != ''"
    if name is not None:
        condition += " AND attributes.run_name = '{}'".format(name.replace("'", ""))
    found = _pages(
        client.search_runs,
        limit,
        experiment_ids=list(experiments),
        filter_string=condition,
        order_by=["attributes.start_time DESC"],
    )
    for entry in found:
        yield _run(entry, experiments[entry.info.experiment_id])


def _pages(search: Any, limit: int | None = None, **asked: Any) -> Iterator[Any]:
    token, given = None, 0
    while limit is None or given < limit:
        size = _PAGE if limit is None else min(_PAGE, limit - given)
        page = search(max_results=size, page_token=token, **asked)
        yield from page
        given += len(page)
        token = page.token
        if not token:
            return


def _run(found: "MlflowRun", experiment: str) -> Run:
    info, data = found.info, found.data
    return Run(
        run_id=str(info.run_id),
        name=str(info.run_name),
        experiment=experiment,
        status=str(info.status),
        started=_time(info.start_time),
        ended=None if not info.end_time else _time(info.end_time),
        parameters=dict(data.params),
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
