"""Where one project keeps its things, and the quiet, local defaults of the tools it stands on."""

import os
import stat
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from camera.logs import harmless_logs
from camera.secrets import without_secrets

PACKAGES = ("prefect", "fastapi", "sqlalchemy", "mlflow", "dvc")
"""The packages that a project stands on beside those of the library."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True)
class Project:
    """One folder (`.camera/` unless $CAMERA_HOME says otherwise) that holds all state of a project."""

    home: Path

    @classmethod
    def here(cls) -> "Project":
        """The project of the current directory."""
        return cls(Path(os.environ.get("CAMERA_HOME", ".camera")).resolve())

    @property
    def store(self) -> Path:
        """The content-addressed artifact store."""
        return self.home / "store"

    @property
    def prefect_home(self) -> Path:
        """Prefect's own folder, with a database that holds secrets and the key to them: each user has one."""
        return own_folder(self.home / "prefect")

    @property
    def prefect_results(self) -> Path:
        """Prefect's result records: a few bytes per stage that point into the store."""
        return self.home / "prefect-results"

    @property
    def mlflow_artifacts(self) -> Path:
        """Files that people look at, by MLflow run."""
        return self.home / "mlflow-artifacts"

    @property
    def mlflow_uri(self) -> str:
        """The tracking server or database in use."""
        return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.home / 'mlflow.db'}")

    @property
    def mlflow_shown(self) -> str:
        """The same for people and logs, without a password."""
        return without_secrets(self.mlflow_uri)

    @property
    def prefect_api(self) -> str:
        """The Prefect API in use; without a URL one is started inside the process."""
        return without_secrets(os.environ.get("PREFECT_API_URL", "in this process (ephemeral)"))

    def configure(self) -> None:
        """Set what the environment does not: everything local, no telemetry, no server to start.

        Must run before prefect, mlflow or dvc is imported. Values that are set already are respected.
        """
        harmless_logs()
        self.home.mkdir(parents=True, exist_ok=True)
        share(self.home)
        if "PREFECT_HOME" not in os.environ:
            with suppress(OSError):  # in another user's home, which this one may only read
                private_folder(self.prefect_home)
        for name, value in self._defaults().items():
            os.environ.setdefault(name, value)
        exempt_loopback(os.environ)

    def _defaults(self) -> dict[str, str]:
        return {
            "DO_NOT_TRACK": "true",
            "PREFECT_HOME": str(self.prefect_home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # The ephemeral API needs 16 to 33 s on two cores, and Prefect's own time-out is 20 s.
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_CLI_PROMPT": "false",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.home / 'mlflow.db'}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            # Its own 7 tries of 120 s each, doubling the pause, are half an hour for every number of a night's run.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DVC_NO_ANALYTICS": "true",
            "GIT_PYTHON_REFRESH": "quiet",
            "TOKENIZERS_PARALLELISM": "true",
        }


def share(home: Path) -> None:
    """Let whoever may write a project's folder write what this process makes: locks, artifacts, the database.

    A folder that its group may write is shared, whatever the umask of those who work in it; git's
    `core.sharedRepository` does the same.
    """
    rights = home.stat().st_mode
    shared = (0o070 if rights & 0o020 else 0) | (0o007 if rights & 0o002 else 0)
    umask = os.umask(0o077)
    os.umask(umask & ~shared)


def own_folder(folder: Path) -> Path:
    """A folder of this user's: where another's has the name, one that ends in the number of this user."""
    with suppress(OSError):  # it is not there yet, or cannot be looked at
        if folder.stat().st_uid != os.getuid():
            return folder.with_name(f"{folder.name}-{os.getuid()}")
    return folder


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner can look into, or make it so."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def exempt_loopback(environment: MutableMapping[str, str]) -> None:
    """Let no client in this process or its children ask a proxy for this machine's own services.

    Where a proxy is set and `no_proxy` names no loopback address, which company networks often leave out, Prefect's API and
    an MLflow server on this machine would be asked for through the proxy, which has others.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    exempt = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in exempt:
        exempt += [host for host in _LOOPBACK if host not in exempt]
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(exempt)  # clients read one or the other
