"""MLflow's server, asked so that one that is away costs a whole run seconds.

MLflow's own client repeats every request, and waits a minute for a server that takes connections and says nothing.
So it is let loose only after one short question was answered, and after a failure that took time the server is left
alone, for longer each time.
"""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from camera.secrets import without_secrets

_ANSWER_SECONDS = 5
_QUESTION = "/api/2.0/mlflow/experiments/get"
"""Of the experiment that every server has. It reads the database; `/health` answers also where that is away."""
_PAUSE_SECONDS = 60.0
_CHEAP_SECONDS = 1.0
"""A failure that took less (a refused connection) is no reason to be patient for longer."""
_AWAY = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
)
"""What MLflow calls an error that says nothing of what was asked; any other is a refusal."""


class ServerAway(OSError):
    """The server gave no answer, or one that says that it cannot work now: it may be there later."""


class NotAServer(OSError):
    """The address is none, or what answers there is no MLflow server: waiting would not help."""


def is_server(uri: str) -> bool:
    """Whether a tracking URI is that of a server, and not of a database that this process opens."""
    return uri.partition(":")[0].lower() in ("http", "https")


def says_nothing(error: Exception) -> bool:
    """Whether what failed may go well later, unchanged; else it is a refusal, and somebody has to mend something."""
    if isinstance(error, NotAServer):
        return False
    return getattr(error, "error_code", _AWAY[0]) in _AWAY


def check_server(uri: str) -> None:
    """Return at once if the server answers; it has five seconds. Does nothing if the URI is not that of a server.

    Whether the answer is a refusal (401, 403) is left to the request that follows, which is the one that matters.

    Raises:
        ServerAway: if it does not, or says that it cannot work now.
        NotAServer: if the address is malformed, its certificate is not trusted, or something else answers there.
    """
    if not is_server(uri):
        return
    _check_address(uri)
    from mlflow.exceptions import InvalidUrlException, MlflowException  # seconds; only who tracks pays them
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

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
            raise ServerAway(f"no answer within {_ANSWER_SECONDS} s") from error
        raise ServerAway(without_secrets(str(causes[-1]))) from error
    if answer.status_code >= 500 or answer.status_code in (408, 429):
        raise ServerAway(f"it answers {answer.status_code} {answer.reason}")
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


class Patience:
    """When a server may be asked again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slow = 0
        self._again = self._urgently_again = 0.0

    def may_ask(self, urgent: bool) -> bool:
        """Whether to ask now.

        Args:
            urgent: there may be no later time, as at the end of a run.
        """
        return self._clock() >= (self._urgently_again if urgent else self._again)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Take the time of asking. After failures that took time the pause doubles, so a night has few of them."""
        started = self._clock()
        try:
            yield
        except Exception:
            ended = self._clock()
            slow = ended - started > _CHEAP_SECONDS
            self._slow += slow
            self._again = ended + _PAUSE_SECONDS * 2 ** max(self._slow - 1, 0)
            self._urgently_again = ended + (_PAUSE_SECONDS if slow else 0.0)
            raise
        self._slow, self._again, self._urgently_again = 0, 0.0, 0.0


_PATIENCE: dict[str, Patience] = {}


def patience_with(uri: str) -> Patience:
    """The patience of this process with one server: the members of a sweep do not each wait for the same one."""
    return _PATIENCE.setdefault(uri, Patience())
