"""The secret of a project's servers: made once, in a file that only its owner reads, and given by environment alone."""

import os
import secrets
import stat
from collections.abc import MutableMapping
from pathlib import Path

from camera.errors import CameraError
from flows.services import Services
from tasks.project import Project, own_folder, private_folder

USER = "camera"


def secret_file(home: Path) -> Path:
    """Where `user:password` of a project's servers is kept."""
    return own_folder(home / "serve") / "secret"


def project_secret(home: Path) -> str:
    """`user:password` of a project's servers; made if there is none.

    Raises:
        CameraError: if others can read it, or it is another user's.
    """
    path = secret_file(home)
    private_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{USER}:{secrets.token_urlsafe(32)}\n")
    return _read(path)


def _read(path: Path) -> str:
    try:
        found = path.lstat()
        text = path.read_text(encoding="utf-8").strip()
    except PermissionError:
        raise CameraError(
            f"{path} is another user's: a project's servers are asked by who started them"
        ) from None
    if not stat.S_ISREG(found.st_mode) or stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.getuid():
        raise CameraError(
            f"{path} can be read by others, or is not yours: `camera serve --stop`, delete it, and `camera serve` makes another"
        )
    if not text.partition(":")[2]:
        raise CameraError(
            f"{path} holds no secret: `camera serve --stop`, delete it, and `camera serve` makes another"
        )
    return text


def know_own_servers(project: Project, environment: MutableMapping[str, str]) -> None:
    """Let clients in this process show the secret to the servers that `camera serve` of this project runs here.

    To no other: the address must be of a process that this project recorded and that is alive. What the environment
    says already is left as it is.

    Raises:
        CameraError: if the secret's file is not as it should be.
    """
    names = {
        "prefect": ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"),
        "mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    }
    asked = {name: environment.get(address, "").rstrip("/") for name, (address, *_) in names.items()}
    if not any(address.startswith("http") for address in asked.values()):
        return
    known = Services(project.home).known()
    for name, address in asked.items():
        service = known.get(name)
        is_set = any(environment.get(each) for each in names[name][1:])
        if service is None or is_set or not address or service.url != address or not service.alive:
            continue
        user_and_password = project_secret(project.home)
        if name == "prefect":
            environment["PREFECT_API_AUTH_STRING"] = user_and_password
        else:
            user, _, password = user_and_password.partition(":")
            environment["MLFLOW_TRACKING_USERNAME"] = user
            environment["MLFLOW_TRACKING_PASSWORD"] = password
