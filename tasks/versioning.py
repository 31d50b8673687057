"""DVC: the versions of bytes that must outlive a machine. Used in process, and only where there is a DVC repository."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from camera.errors import CameraError, NetworkError

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Version:
    """A DVC version of a file or folder."""

    dvc_file: str
    """The .dvc file that names it, relative to the repository."""
    md5: str
    """DVC's own hash; `.dir` at the end for a folder."""
    pushed_to: str | None
    """The remote that holds it; None if there is no remote, or the push is still to be done."""
    push_error: str | None = None
    """Why a push is still to be done."""


def repository_root(path: Path) -> Path | None:
    """The DVC repository that a path is in, if it is in one."""
    start = path.resolve()
    for folder in (start, *start.parents):
        if (folder / ".dvc" / "config").is_file():
            return folder
    return None


def tracking_file(path: Path) -> Path | None:
    """The .dvc file whose output is this path or a folder above it, if there is one."""
    root = repository_root(path)
    if root is None:
        return None
    place = path.resolve()
    while place != root:
        candidate = place.with_name(place.name + ".dvc")
        if candidate.is_file():
            return candidate
        place = place.parent
    return None


def tracked_version(path: Path) -> dict[str, str] | None:
    """What lineage says of a path that DVC tracks: the .dvc file and the hash in it."""
    file = tracking_file(path)
    if file is None:
        return None
    root = repository_root(path)
    assert root is not None
    return {"file": str(file.relative_to(root)), "md5": _md5(file)}


def pull_if_tracked(path: Path) -> None:
    """Fetch a missing path from the DVC remote if a .dvc file tracks it.

    Raises:
        NetworkError: if the remote does not give it.
    """
    file = tracking_file(path)
    if file is None:
        return
    try:
        with _open(path) as repo:
            repo.pull(targets=[str(file)])
    except Exception as error:  # dvc's remotes raise types of their own, each from another library
        raise NetworkError(
            f"{path} is tracked by {file.name} and could not be pulled: {error}. Try `dvc pull {file.name}`"
        ) from error


def add_and_push(folder: Path, remote: str | None) -> Version | None:
    """Version a folder with DVC and push it; None if the folder is in no DVC repository.

    A push that fails is no failure of the run: the version exists locally, and says that it is still to be pushed.

    Raises:
        CameraError: if DVC cannot add the folder.
    """
    root = repository_root(folder)
    if root is None:
        return None
    with _open(folder) as repo:
        try:
            repo.add([str(folder)])
        except Exception as error:  # dvc raises a type per cause; all mean that the folder is not versioned
            raise CameraError(f"DVC cannot add {folder}: {error}") from error
        file = folder.with_name(folder.name + ".dvc")
        pushed: str | None = remote or repo.config["core"].get("remote")
        problem = None
        if pushed is not None:
            try:
                repo.push(targets=[str(file)], remote=pushed)
            except Exception as error:  # as above: whatever the remote's library raises, the push is pending
                pushed, problem = None, f"{type(error).__name__}: {error}"
    return Version(str(file.relative_to(root)), _md5(file), pushed, problem)


def verify(dvc_file: Path) -> str | None:
    """Compare the workspace with a .dvc file: None if they agree, else what differs, in words.

    Raises:
        CameraError: if the file lies in no DVC repository, or DVC cannot read it.
    """
    if repository_root(dvc_file) is None:
        raise CameraError(f"{dvc_file} is in no DVC repository: it was copied without the one it belongs to")
    try:
        with _open(dvc_file) as repo:
            changes = repo.status(targets=[str(dvc_file)])
    except Exception as error:  # dvc raises a type per cause; all mean that nothing can be compared
        raise CameraError(f"DVC cannot compare {dvc_file} with the workspace: {error}") from error
    return None if not changes else f"{dvc_file.name}: {changes}"


@contextmanager
def _open(path: Path) -> Iterator["Repo"]:
    from dvc.repo import Repo  # half a second; only runs that touch DVC pay it

    root = repository_root(path)
    with Repo(str(root)) as repo:
        yield repo


def _md5(file: Path) -> str:
    try:
        return str(yaml.safe_load(file.read_text(encoding="utf-8"))["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        raise CameraError(f"{file} is not a .dvc file that can be read: run `dvc status`") from None
