"""What a run starts from: the model and the local datasets, found, fetched from DVC if need be, and hashed."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.hub import local_checkpoint
from camera.digests import digest_file, digest_json, files_below
from camera.errors import CameraError
from camera.escape import one_line
from camera.evaluation.lm_eval_tasks import task_files
from camera.formats.convertible import check_convertible
from camera.held import Held, hold, holding
from camera.options import DatasetOptions, EvaluateOptions
from tasks import versioning
from tasks.lineage_form import can_name
from tasks.project import Project
from tasks.recipe import Recipe
from tasks.stage import Input

_DOCUMENTATION = ("*.md", "license*", "notice*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf")


@dataclass(frozen=True)
class Sources:
    """Everything outside the store that a recipe reads."""

    checkpoint: Checkpoint
    model: Input
    """What decides the model: weights, config, tokenizer, remote code. Its documentation does not."""
    folder: Input
    """The same with its documentation, which only a copy of the whole folder carries on."""
    tokenizer: Input
    """The same folder, identified by its tokenizer files alone: datasets do not change with the weights."""
    files: dict[str, Input]
    """Local datasets, by path as written in the recipe."""
    tasks: dict[str, Input] = field(default_factory=dict)
    """Local documents, by task: the folder of all of them, identified by the files of this one alone."""

    @cached_property
    def gguf_concerns(self) -> list[str]:
        """What should be known of a GGUF file of the model, a sentence each.

        Raises:
            CameraError: if there is none; the members of a sweep ask once.
        """
        with holding(*self._held, again=False):
            return check_convertible(self.checkpoint)

    @cached_property
    def tokens(self) -> int:
        """How many tokens the model's tokenizer knows.

        Raises:
            CameraError: if it cannot be loaded, or belongs to another model.
        """
        with holding(*self._held, again=False):
            return len(self.checkpoint.load_tokenizer())

    @property
    def _held(self) -> list[Held]:
        return [] if self.folder.held is None else [self.folder.held]


def find_sources(recipe: Recipe) -> Sources:
    """Locate and hash all that a recipe reads; what DVC tracks and is not here is pulled.

    Raises:
        CameraError: if something is missing or damaged.
    """
    _pull(Path(recipe.model))
    checkpoint = Checkpoint.open(local_checkpoint(recipe.model, recipe.revision))
    everything = hold(checkpoint.folder, checkpoint.files, "here")
    with holding(everything, again=False):  # opened again: what is planned is of the files that were hashed
        checkpoint = Checkpoint.open(checkpoint.folder)
        _check_shapes_once(checkpoint)
    hashes = {name: digest for name, digest in everything.digests.items() if not _documents(name)}
    tokenizer = {name: hashes[name] for name in checkpoint.tokenizer_files}
    if not tokenizer:
        raise CameraError(f"{checkpoint.folder} has no tokenizer files (tokenizer.model or tokenizer.json)")
    commit: dict[str, Any] = {"revision": recipe.revision} if recipe.revision else {}

    def of_model(files: dict[str, str]) -> Input:
        return _input(recipe.model, everything.only(files), files, **commit)

    datasets: list[DatasetOptions] = [recipe.calibration, *recipe.evaluate.datasets]
    return Sources(
        checkpoint,
        model=of_model(hashes),
        folder=of_model(everything.digests),
        tokenizer=_input(
            recipe.model, everything.only(hashes.keys() - checkpoint.weight_files), tokenizer, tracked=False
        ),
        files={str(path): _dataset(path) for path in {each.path for each in datasets} if path},
        tasks=_task_inputs(recipe.evaluate),
    )


def _pull(path: Path) -> None:
    if not path.exists():
        versioning.pull_if_tracked(path)


def _input(
    named: str,
    held: Held,
    files: dict[str, str] | None = None,
    path: Path | None = None,
    *,
    tracked: bool = True,
    **about: Any,
) -> Input:
    """A source and what lineage records of it: its name in the recipe, sha256 of its files, its version in DVC.

    Args:
        named: in the recipe.
        held: its files, all that may be read; those that decide may not change.
        files: those that decide; None for all.
        path: of a source that is one file.
        tracked: whether DVC may know it.
        about: what else is recorded.
    """
    path = path or held.folder
    if tracked and (version := versioning.tracked_version(path)) is not None:
        about["dvc"] = version
    files = held.digests if files is None else files
    for name in (named, *files):  # what the lineage could not name is refused before the first step
        if not can_name(name):
            raise CameraError(
                f"{one_line(path)}: the name {one_line(name)} holds control characters or is too long, and no "
                "lineage takes it: rename it"
            )
    about = {"path": named, "files": files, **about}
    return Input(path, digest_json(files), about=about, held=held)


def _check_shapes_once(checkpoint: Checkpoint) -> None:
    """Check shapes against the config, unless the same were found right before; the files are hashed in any case.

    Building the model's structure brings all of transformers, three seconds that a cached run does not need.
    """
    shapes = {name: [list(info.shape), str(info.dtype)] for name, info in checkpoint.tensors.items()}
    config = digest_file(checkpoint.folder / "config.json")
    seen = digest_json({"config": config, "tensors": shapes, "transformers": version("transformers")})
    mark = Project.here().home / "checked-shapes" / seen
    if not mark.exists():
        checkpoint.check_shapes()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _documents(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in _DOCUMENTATION)


def _dataset(path: Path) -> Input:
    _pull(path)
    if path.is_dir():
        return _input(str(path), hold(path, files_below(path), "below"))
    if path.is_file():
        return _input(str(path), hold(path.parent, [path.name]), path=path)
    raise CameraError(f"dataset {path} does not exist")


def _task_inputs(options: EvaluateOptions) -> dict[str, Input]:
    folder = options.task_folder
    if folder is None:
        return {}
    _pull(folder)
    names = {task: [path.name for path in task_files(task, folder).values()] for task in options.tasks}
    return {task: _input(str(folder), hold(folder, files)) for task, files in names.items()}
