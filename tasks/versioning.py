"""DVC: the versions of bytes that must outlive a machine. Used in process, and only where there is a DVC repository.

What is used of DVC's private names (the object databases of `Repo`, `Tree` of dvc_data) is in this file only.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from camera import shutdown
from camera.errors import CameraError, NetworkError
from camera.secrets import without_secrets
from camera.yaml_text import MAX_CHARACTERS, parse_yaml

if TYPE_CHECKING:
    from dvc.repo import Repo

Answer = TypeVar("Answer")
_log = logging.getLogger("camera.dvc")
_CHUNK_BYTES = 8 << 20
_LOCKED_SECONDS = 600.0
_PAUSE_SECONDS = 0.5
_FIELDS = {"outs", "md5", "desc", "meta"}
_OUT_FIELDS = {"path", "md5", "hash", "size", "nfiles", "isexec", "desc", "meta", "labels", "type", "push"}
"""Of a .dvc file that versions what lies here, and of what it names; others make DVC look elsewhere."""


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
    start = Path(os.path.realpath(path))  # a loop of links is a path like others
    return next((at for at in (start, *start.parents) if (at / ".dvc" / "config").is_file()), None)


def tracking_file(path: Path) -> Path | None:
    """The .dvc file whose output is this path or a folder above it, if there is one."""
    root, place = repository_root(path), Path(os.path.realpath(path))
    if root is None:
        return None
    while place != root:
        candidate = place.with_name(place.name + ".dvc")
        if candidate.is_file():
            return candidate
        place = place.parent
    return None


def tracked_version(path: Path) -> dict[str, str] | None:
    """What lineage says of a path that DVC tracks: the .dvc file and the hash in it."""
    file, root = tracking_file(path), repository_root(path)
    if file is None or root is None:
        return None
    return {"file": str(file.relative_to(root)), "md5": md5_of(file)}


def md5_of(dvc_file: Path) -> str:
    """The hash that a .dvc file names now.

    Raises:
        CameraError: if it names none.
    """
    return str(_content(dvc_file)["outs"][0]["md5"])


def _content(dvc_file: Path) -> dict[str, Any]:
    """What a .dvc file says, which has an output with a hash; as little is read of it as one needs."""
    try:
        with dvc_file.open(encoding="utf-8") as file:
            content = parse_yaml(file.read(MAX_CHARACTERS + 1))
        if isinstance(content, dict) and content["outs"][0]["md5"]:
            return content
    except (ValueError, OSError, LookupError, TypeError):
        pass
    raise CameraError(f"{dvc_file} is not a .dvc file that can be read: run `dvc status`")


def pull_if_tracked(path: Path) -> None:
    """Fetch a missing path from the DVC remote if a .dvc file tracks it.

    Raises:
        NetworkError: if the remote does not give it.
    """
    if (file := tracking_file(path)) is None:
        return
    try:
        with _open(path) as repo:
            _unlocked(repo, lambda: repo.pull(targets=[str(file)]))
    except Exception as error:  # dvc's remotes raise types of their own, each from another library
        raise NetworkError(
            f"{path} is tracked by {file.name} and could not be pulled: {error}. Try `dvc pull {file.name}`"
        ) from error


def refuse_ignored(folder: Path) -> None:
    """Ask before the work whether DVC could add a folder to the repository that it is in, if it is in one.

    Raises:
        CameraError: if git or DVC ignores the folder's .dvc file.
    """
    if (root := repository_root(folder)) is None:
        return
    from dvc.dvcfile import is_git_ignored

    file = f"{folder}.dvc"
    with _open(folder) as repo:
        by_git, by_dvc = is_git_ignored(repo, file), repo.dvcignore.is_ignored_file(file)
    if by_git or by_dvc:
        rules, place = ".gitignore" if by_git else ".dvcignore", Path(file).relative_to(root)
        raise CameraError(
            f"DVC cannot version {folder}: {rules} leaves out {place}, the file that names the version. Write "
            f"`{place.parent}/*` and `!{place.parent}/*.dvc` there in place of `{place.parent}/`, or choose another "
            "publish.folder, or set publish.dvc=false"
        )


def add_and_push(folder: Path, remote: str | None) -> Version | None:
    """Version a folder with DVC and push it; None if the folder is in no DVC repository.

    A push that fails is no failure of the run: the version exists locally, and says that it is still to be pushed.

    Raises:
        CameraError: if DVC cannot add the folder.
    """
    if (root := repository_root(folder)) is None:
        return None
    file, problem = folder.with_name(folder.name + ".dvc"), None
    with _open(folder) as repo:
        try:
            _unlocked(repo, lambda: repo.add([str(folder)]))
        except DvcLockedError:
            raise
        except Exception as error:  # dvc raises a type per cause; all mean that the folder is not versioned
            raise CameraError(f"DVC cannot add {folder}: {error}") from error
        pushed: str | None = remote or repo.config["core"].get("remote")
        if pushed is not None:
            try:
                _unlocked(repo, lambda: repo.push(targets=[str(file)], remote=pushed))
            except Exception as error:  # as above: whatever the remote's library raises, the push is pending
                pushed, problem = None, without_secrets(f"{type(error).__name__}: {error}")
    return Version(str(file.relative_to(root)), md5_of(file), pushed, problem)


def verify(dvc_file: Path) -> str | None:
    """Compare a folder with the .dvc file beside it: None if they agree, else what differs, in words.

    A file that asks DVC for more than that (to follow another path, repository, address or command) is not given to it.

    Raises:
        CameraError: if the file lies in no DVC repository, or DVC cannot read it.
    """
    content, folder = _content(dvc_file), dvc_file.name.removesuffix(".dvc")
    outs = content["outs"]
    named = len(outs) == 1 and outs[0].get("path") == folder
    if not named or not content.keys() <= _FIELDS or not outs[0].keys() <= _OUT_FIELDS:
        return f"{dvc_file.name} is not what `dvc add {folder}` writes"
    if repository_root(dvc_file) is None:
        raise CameraError(f"{dvc_file} is in no DVC repository: it was copied without the one it belongs to")
    try:
        with _open(dvc_file) as repo:
            changes = _unlocked(repo, lambda: repo.status(targets=[str(dvc_file)]))
    except Exception as error:  # dvc raises a type per cause; all mean that nothing can be compared
        raise CameraError(f"DVC cannot compare {dvc_file} with the workspace: {error}") from error
    return None if not changes else f"{dvc_file.name}: {changes}"


def revision_of(root: Path, dvc_file: str, md5: str) -> str | None:
    """The oldest git commit at which a .dvc file named a hash; None outside git, or if there is none."""
    command = ["git", "-C", str(root), "log", "--format=%H", "--reverse", "-S", md5, "--", dvc_file]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def listed(folder: Path, md5: str) -> dict[str, str] | None:
    """md5 of every file of a DVC version of a folder, by name, as the cache on this machine has it; None if it lacks it."""
    root = repository_root(folder)
    if root is None or not md5.endswith(".dir"):
        return None
    with _open(root) as repo:
        files = _files(repo.cache.local, md5)
    return None if files is None else {name.as_posix(): oid for name, oid in files.items()}


def stored_digests(
    root: Path, md5: str, inside: PurePosixPath, from_remote: bool = False
) -> tuple[dict[str, str], str]:
    """Hex sha256 of every file of a DVC version, read from where DVC keeps its bytes, whatever the workspace holds.

    Args:
        root: the DVC repository.
        md5: DVC's hash of the version; of any time, for the bytes are found by it alone.
        inside: only the files below this folder of the version, or this one file; `.` is all.
        from_remote: do not look in the cache on this machine.

    Returns:
        The digests by name relative to `inside`, and where the bytes were: `the cache` or `the remote box`.

    Raises:
        NetworkError: if the remote does not answer.
        CameraError: if no place has the version; the message says which were asked.
    """
    with _stored(root, md5, from_remote) as (files, read, where):
        digests: dict[str, str] = {}
        for name, oid in files.items():
            if name.is_relative_to(inside):
                relative = name.relative_to(inside)
                with read(oid) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                digests[relative.as_posix() if relative.parts else name.name] = digest
        return digests, where


def room(place: Path) -> Path | None:
    """Where a copy of a version of a folder takes no room: on the disk of DVC's cache. None if nothing can be written there."""
    root = repository_root(place.parent)
    found = None if root is None else root / ".dvc" / "tmp"
    return found if found is not None and found.is_dir() and os.access(found, os.W_OK) else None


def restore(place: Path, md5: str, out: Path) -> str:
    """Write the files of a DVC version of a folder into a new folder; where the bytes were.

    Files of the cache are linked where the disk allows it. They are to be read, not written.

    Raises:
        NetworkError: if the remote does not answer.
        CameraError: if the place is in no DVC repository, or no place has the version.
    """
    if (root := repository_root(place.parent)) is None:
        raise CameraError(f"{place} is in no DVC repository")
    with _stored(root, md5, False) as (files, read, where):
        for name, oid in files.items():
            target = out / name
            if not target.resolve().is_relative_to(out.resolve()):
                raise CameraError(f"DVC version {md5} names a file outside its folder: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with read(oid) as file:
                try:
                    os.link(file.name, target)
                except (AttributeError, TypeError, OSError):  # of a remote, or on another disk
                    with target.open("wb") as copy:
                        shutil.copyfileobj(file, copy, _CHUNK_BYTES)
        return where


@contextmanager
def _stored(
    root: Path, md5: str, from_remote: bool
) -> Iterator[tuple[dict[PurePosixPath, str], Callable[[str], Any], str]]:
    """The files of a version by name, a function that opens one, and the place that has them all."""
    from dvc.config import NoRemoteError

    with _open(root) as repo:
        odb, where, problems = repo.cache.local, "the cache", list[str]()
        files = None if from_remote else _files(odb, md5)
        if files is None:
            problems += [] if from_remote else ["the cache lacks it"]
            try:
                name = repo.config["core"].get("remote")
                odb, where = repo.cloud.get_remote_odb(name), f"the remote {name}"
                files = _files(odb, md5)
            except NoRemoteError:
                raise CameraError("; ".join([*problems, "there is no DVC remote"])) from None
            except Exception as error:  # dvc's remotes raise types of their own, each from another library
                raise NetworkError("; ".join([*problems, f"the remote did not answer: {error}"])) from error
        if files is None:
            raise CameraError("; ".join([*problems, f"{where} lacks it"]))
        yield files, lambda oid: odb.fs.open(odb.oid_to_path(oid), "rb"), where


def _files(odb: Any, md5: str) -> dict[PurePosixPath, str] | None:
    """The object of every file of a version, by name; None if any is not there."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if not odb.exists(md5):
        return None
    if not md5.endswith(".dir"):
        return {PurePosixPath(): md5}
    tree = Tree.load(odb, HashInfo("md5", md5))
    files = {PurePosixPath(*key): str(found.value) for key, (_, found) in tree.iteritems()}
    return files if all(odb.exists(oid) for oid in files.values()) else None


class DvcLockedError(CameraError):
    """Another process held DVC's lock for longer than anybody should wait."""


def _unlocked(repo: "Repo", act: Callable[[], Answer]) -> Answer:
    """Do something with a repository as soon as no other process holds DVC's lock. DVC itself waits three seconds.

    Raises:
        DvcLockedError: after ten minutes.
    """
    from dvc.lock import LockError

    started = time.monotonic()
    said = False
    while True:
        try:
            return act()
        except LockError as error:
            if time.monotonic() - started > _LOCKED_SECONDS:
                raise DvcLockedError(
                    f"DVC's lock in {repo.root_dir} was held by another process for {_LOCKED_SECONDS:.0f} s: end it, "
                    f"or wait for it, and run the same command again ({error})"
                ) from error
        if not said:
            _log.warning("waiting for another process that holds DVC's lock in %s", repo.root_dir)
            said = True
        shutdown.check()
        time.sleep(_PAUSE_SECONDS)


@contextmanager
def _open(path: Path) -> Iterator["Repo"]:
    from dvc.repo import Repo  # half a second; only runs that touch DVC pay it

    with Repo(str(repository_root(path))) as repo:
        yield repo
