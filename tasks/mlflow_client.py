"""MLflow's client, so that a server or database that cannot be used costs a whole run seconds.

The client itself repeats every request, waits a minute for a server that accepts connections and never answers, and
tries a broken database for 100 s. So it is used only after one short question was answered, and after a slow failure
the server is left alone for longer each time (`Backoff`).
"""

import os
import re
import sqlite3
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from camera.errors import CameraError, NetworkError
from camera.files import atomic_file
from camera.locks import output_lock
from camera.secrets import without_secrets
from tasks.busy_database import patiently, wait_for_busy_databases

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_ANSWER_SECONDS = 5
_QUESTION = "/api/2.0/mlflow/experiments/get"
"""Of the experiment that every server has. It reads the database; `/health` answers also where that is away."""
_PAGE = 500
_PAUSE_SECONDS = 60.0
_CHEAP_SECONDS = 1.0
"""A failure that took less (a refused connection) is no reason to ask less often."""
QUOTED = re.compile(r"[^\w .:/@+=,-]")
"""What may mean something in a condition of MLflow's search; names that hold it are compared here instead."""
_TRANSIENT = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
)
"""MLflow's codes of errors that do not concern the request; any other is a refusal."""


class ServerUnavailable(OSError):
    """The server gave no answer, or one that says that it cannot work now: it may be there later."""


class NotAServer(OSError):
    """The address is malformed, or what answers there is no MLflow server: waiting would not help."""


class ExperimentDeleted(OSError):
    """Somebody deleted the experiment: it has to be restored, or another be named."""


def tracking_uri() -> str:
    """The tracking server or database in use."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


@contextmanager
def mlflow_client() -> "Iterator[MlflowClient | None]":
    """A client of the server or database in use; None where that database was never made.

    Raises:
        NetworkError: for whatever MLflow fails with in the block, naming its address.
    """
    database = database_of(tracking_uri())
    if database is not None and not database.exists():
        yield None
        return
    from mlflow.exceptions import MlflowException  # seconds; only who has a registry pays them
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield connect()
    except CameraError:
        raise
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        message = f"MLflow at {tracking_uri()} cannot be used: {in_short(error)}"
        raise NetworkError(without_secrets(message)) from error


def pages(search: Any, limit: int | None = None, **asked: Any) -> Iterator[Any]:
    """Everything that a search of MLflow's client finds, page by page; at most `limit`."""
    token, given = None, 0
    while limit is None or given < limit:
        size = _PAGE if limit is None else min(_PAGE, limit - given)
        page = search(max_results=size, page_token=token, **asked)
        yield from page
        given += len(page)
        token = page.token
        if not token:
            return


@contextmanager
def existing_registry() -> "Iterator[MlflowClient]":
    """The client for whoever found something in the registry, or recorded something there, a moment ago.

    Raises:
        NetworkError: as `mlflow_client`; and if the database was taken away since.
    """
    with mlflow_client() as client:
        if client is None:
            address = without_secrets(tracking_uri())
            raise NetworkError(f"MLflow at {address} cannot be used: the database was taken away meanwhile")
        yield client


def connect() -> "MlflowClient":
    """A client of the tracking server or database in use.

    Raises:
        OSError: if it is an SQLite database that cannot be opened or made, or a server that does not answer in seconds.
    """
    from mlflow.tracking import MlflowClient  # 2.5 s; only who tracks or asks pays it

    if (database := database_of(tracking_uri())) is not None:
        wait_for_busy_databases()
        ready_database(database)
    check_server(tracking_uri())
    return MlflowClient()


def database_of(uri: str) -> Path | None:
    """The file of a tracking address; None if that is no SQLite database."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def ready_database(path: Path) -> None:
    """Check that the database can be opened, and make it if it is missing.

    MLflow makes some forty tables one by one, and cannot use a database in which a kill left half of them. So one
    process makes them, under a temporary name.

    Raises:
        OSError: if it cannot be opened or made.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if path.exists():
        try:
            with closing(
                sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1)
            ) as database:
                patiently(lambda: database.execute("PRAGMA schema_version").fetchone())
        except sqlite3.Error as error:
            raise OSError(f"{path}: {error}") from None
        return
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to")
    with output_lock(path, wait=True):
        if not path.exists():
            from mlflow.tracking import MlflowClient

            with atomic_file(path) as temporary:
                MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)  # makes the tables
                temporary.chmod(0o644 | path.parent.stat().st_mode & 0o022)  # SQLite itself heeds no umask


def is_server(uri: str) -> bool:
    """Whether a tracking URI is that of a server, and not of a database that this process opens."""
    return uri.partition(":")[0].lower() in ("http", "https")


def in_short(error: Exception) -> str:
    """An error of MLflow's in a line: SQLAlchemy's go on with the statement and its parameters."""
    text = str(error)
    if "(sqlite3." not in text:
        return text
    if "readonly database" in text:
        return "this user may not write the database: correct the rights of its file and folder"
    return text.partition("\n")[0]


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later; else it is a refusal, and somebody has to change something."""
    return (
        not isinstance(error, NotAServer | ExperimentDeleted)
        and getattr(error, "error_code", _TRANSIENT[0]) in _TRANSIENT
    )


def check_server(uri: str) -> None:
    """Return once the server answers; it has five seconds. Does nothing if the URI is not that of a server.

    A refusal (401, 403) is an answer: the request that follows will say what it means.

    Raises:
        ServerUnavailable: if it does not answer, or says that it cannot work now.
        NotAServer: if the address is malformed, its certificate is not trusted, or something else answers there.
    """
    if not is_server(uri):
        return
    _check_address(uri)
    from mlflow.exceptions import InvalidUrlException, MlflowException  # seconds; only who tracks pays them
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request  # private: the client's own credentials and TLS settings

    try:
        answer = http_request(
            get_default_host_creds(uri),
            _QUESTION,
            "GET",
            params={"experiment_id": "0"},
            max_retries=0,
            timeout=_ANSWER_SECONDS,
            raise_on_status=False,
        )
    except InvalidUrlException as error:
        raise NotAServer(without_secrets(str(error))) from error
    except MlflowException as error:
        causes = list(_causes(error))
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            raise NotAServer(f"its certificate is not trusted: {causes[-1]}") from error
        if any(isinstance(cause, TimeoutError) for cause in causes):
            raise ServerUnavailable(f"no answer within {_ANSWER_SECONDS} s") from error
        raise ServerUnavailable(without_secrets(str(causes[-1]))) from error
    if answer.status_code >= 500 or answer.status_code in (408, 429):
        raise ServerUnavailable(f"it answers {answer.status_code} {answer.reason}")
    if answer.status_code == 200 and not answer.text.lstrip().startswith("{"):
        raise NotAServer("what answers there is no MLflow server")


def _check_address(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        if parts.hostname and parts.port != 0:
            return
        reason = "it names no host" if not parts.hostname else "no server has port 0"
    except ValueError as error:
        reason = str(error)
    raise NotAServer(f"MLFLOW_TRACKING_URI is no address: {reason}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what lies beneath it, down to the operating system's own. Clients wrap it in four ways."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        inner = [getattr(found, "reason", None), found.__cause__, found.__context__, *found.args]
        found = next((each for each in inner if isinstance(each, BaseException)), None)


class Backoff:
    """When a server that failed may be asked again: after slow failures the pause doubles, so a night has few."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed_at = self._pause = self._urgent_pause = 0.0

    def may_try(self, *, urgent: bool) -> bool:
        """Whether to ask now; `urgent` where there may be no later time, as at the end of a run."""
        return self._clock() - self._failed_at >= (self._urgent_pause if urgent else self._pause)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Ask in this block; its failure, and how long that took, set the next time."""
        started = self._clock()
        try:
            yield
        except Exception:
            self._failed_at = self._clock()
            slow = self._failed_at - started > _CHEAP_SECONDS
            self._pause = max(_PAUSE_SECONDS, self._pause * (2 if slow else 1))
            self._urgent_pause = _PAUSE_SECONDS if slow else 0.0
            raise
        self._pause = self._urgent_pause = 0.0


_BACKOFFS: dict[str, Backoff] = {}


def backoff_of(uri: str) -> Backoff:
    """The back-off of this process with one server: the members of a sweep do not each wait for it."""
    return _BACKOFFS.setdefault(uri, Backoff())
