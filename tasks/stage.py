"""A stage: a function from named inputs and options to one folder; its place in a run, and the request to perform it."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camera.digests import digest_json
from camera.disk import explain_disk_errors
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.held import Held, SourceChangedError, holding
from camera.options import Options
from camera.progress import Progress, silent
from camera.registry import Registry
from tasks.estimate import Known, Needs
from tasks.lineage import ancestry, environment, stage_entry
from tasks.options import Sections
from tasks.store import Artifact, Store


@dataclass(frozen=True)
class RunReferences:
    """Where else this run is recorded; never part of a key."""

    mlflow_run: str | None = None
    prefect_run: str | None = None
    mlflow_pending: str | None = None
    """Why MLflow cannot be used now, although it is to record the run."""


@dataclass(frozen=True)
class Input:
    """One input of a stage: an artifact of an earlier stage, or a source that lies outside the store."""

    path: Path
    digest: str
    stage: str | None = None
    key: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """For a source: what lineage records of it."""
    held: Held | None = field(default=None, repr=False)
    """For a source: the files that are read, as they were when they were hashed."""

    @classmethod
    def of(cls, artifact: Artifact) -> "Input":
        return cls(artifact.path, artifact.digest, artifact.stage, artifact.key)


@dataclass(frozen=True)
class Context:
    """What a stage's function is given."""

    inputs: dict[str, Path]
    made_by: dict[str, str | None]
    """The stage that made each input; None for a source."""
    options: Sections
    out: Path
    """The folder to fill."""
    progress: Progress
    lineage: dict[str, Any]
    """Everything this artifact descends from."""
    references: RunReferences


@dataclass(frozen=True)
class Stage:
    """A kind of work.

    The version is raised when the same inputs and options begin to mean another result; that and only that
    makes earlier artifacts of the stage unused.
    """

    name: str
    version: int
    run: Callable[[Context], dict[str, float]]
    """Fills the folder, and gives the numbers that it measured."""
    options: Mapping[str, type[Options]]
    """The sections that it may be asked with."""
    needs: Callable[[Known], Needs]
    """Estimates disk and memory from shapes alone."""
    intermediate: bool
    """Whether nobody reads its artifacts once the model is published, so that `camera gc` may evict them."""
    part: str | None = None
    """What the report calls its artifact; None if it reads none."""
    trial: Callable[[Known], Needs] | None = None
    """A better estimate, from a trial of seconds; made only for a step that would run."""
    resumes: bool = False
    """Whether `run` goes on from what a killed one left in its folder."""
    still_holds: Callable[[Artifact], bool] = lambda artifact: True
    """For stages with an effect outside the store: whether that effect is still there."""
    joins: Callable[[list["Step"]], list["Step"]] = lambda steps: []
    """Given the steps of a recipe so far, those that this stage adds by itself; none where the pipeline names it."""


STAGES: Registry[Stage] = Registry("stage", "tasks.stages", plugins="camera.pipeline")
"""Every stage by its name; a module of tasks/stages registers one."""


def register(stage: Stage) -> Stage:
    """Make a stage known by its name."""
    return STAGES.register(stage.name, stage)


@dataclass(frozen=True)
class Request:
    """One stage to perform on certain inputs."""

    step: str
    """What people call it: `quantize baseline`."""
    stage: Stage
    options: Sections
    """What is asked for."""
    inputs: dict[str, Input]
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the result depends on and the stage finds out itself: the device's name, a library's version."""
    references: RunReferences = RunReferences()

    @property
    def key(self) -> str:
        """Digest of stage name, version, facts, the identity of the options, and the inputs' content digests."""
        return digest_json(
            {
                "stage": self.stage.name,
                "version": self.stage.version,
                "options": self.options.identity(),
                "facts": self.facts,
                "inputs": {name: given.digest for name, given in self.inputs.items()},
            }
        )


@dataclass(frozen=True)
class Step:
    """One stage of one run, before its inputs exist."""

    name: str
    stage: Stage
    options: Sections
    inputs: Mapping[str, "str | Input"]
    """By the stage's own name for an input: the step that makes it, or a source."""
    facts: dict[str, Any] = field(default_factory=dict)
    """As of a request."""

    @property
    def needs(self) -> list[str]:
        """The steps that must be done before this one."""
        return [given for given in self.inputs.values() if isinstance(given, str)]

    @property
    def part(self) -> str | None:
        """What the report calls its artifact: `quantized/baseline` of the step `quantize baseline`."""
        part, more = self.stage.part, self.name.removeprefix(self.stage.name)
        return None if part is None else part + more.replace(" ", "/")

    def request(self, done: Mapping[str, Artifact]) -> Request:
        """The request, once the artifacts of all needed steps are known."""
        inputs = {
            name: given if isinstance(given, Input) else Input.of(done[given])
            for name, given in self.inputs.items()
        }
        return Request(self.name, self.stage, self.options, inputs, self.facts)


def find(store: Store, request: Request) -> Artifact | None:
    """The artifact of a request if the store has it intact and its effects are still there."""
    artifact = store.find(request.stage.name, request.key)
    return artifact if artifact is not None and request.stage.still_holds(artifact) else None


@contextmanager
def _from_sources(request: Request, folder: Path) -> Iterator[None]:
    """Fill a working folder from what was hashed, and from nothing else.

    What a killed run left there is used only if the sources are the very files that it read. If one is not, or changes, the
    folder is emptied.
    """
    sources = [given.held for given in request.inputs.values() if given.held is not None]
    if not sources:
        yield
        return
    mark = _mark(folder)
    files = {name: given.held.mark for name, given in request.inputs.items() if given.held is not None}
    if not (mark.is_file() and _same(mark, files)):
        _empty(folder)
        write_json(mark, files)
    try:
        with holding(*sources):
            yield
    except SourceChangedError:
        _empty(folder)
        raise


def _mark(working: Path) -> Path:
    """Where it is written from which files a working folder is filled: beside it, for a stage finds an empty folder."""
    return working.with_name(f"{working.name}.json")


def _same(mark: Path, files: dict[str, Any]) -> bool:
    try:
        return bool(read_json(mark) == files)
    except CameraError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def perform(
    store: Store,
    request: Request,
    progress: Progress = silent,
    started: Callable[[], None] = lambda: None,
    waiting: Callable[[], None] = lambda: None,
) -> Artifact:
    """The artifact of a request: from the store, or made now.

    Two that want the same key at once: one works, the other waits and takes the result.

    Args:
        store: the artifact store.
        request: what to perform.
        progress: passed on to the stage.
        started: called when the stage does run.
        waiting: called when another process holds the key.

    Raises:
        DiskError: if a disk is full or cannot be written to.
        SourceChangedError: if a source is not what was hashed, or does not stay so until the stage is done.
    """
    with explain_disk_errors(store.root), store.lock(request.key, waiting):
        if (artifact := find(store, request)) is not None:
            return artifact
        started()
        lineage = ancestry(request.inputs)

        def fill(folder: Path) -> dict[str, float]:
            paths = {name: given.path for name, given in request.inputs.items()}
            stages = {name: given.stage for name, given in request.inputs.items()}
            with _from_sources(request, folder):
                return request.stage.run(
                    Context(paths, stages, request.options, folder, progress, lineage, request.references)
                )

        about = {
            "step": request.step,
            "version": request.stage.version,
            "options": request.options.identity(),
            "facts": request.facts,
            "inputs": {
                name: {"digest": given.digest, "stage": given.stage, "key": given.key}
                for name, given in sorted(request.inputs.items())
            },
            "environment": environment(request.facts.get("device")),
        }
        own = stage_entry({**about, "stage": request.stage.name, "key": request.key})
        made = store.make(
            request.stage.name,
            request.key,
            fill,
            about,
            {**lineage, "artifact": own},
            resumes=request.stage.resumes,
        )
        _mark(store.working(request.stage.name, request.key)).unlink(missing_ok=True)
        return made
