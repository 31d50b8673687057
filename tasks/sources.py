"""What a run starts from: the model and the local datasets, found, fetched from DVC if need be, and hashed."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.hub import local_checkpoint
from camera.digests import digest_file, digest_files, digest_json, files_below
from camera.errors import CameraError
from camera.evaluation.lm_eval_tasks import task_files
from camera.formats.convertible import check_convertible
from camera.options import DatasetOptions, EvaluateOptions
from tasks import versioning
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
        return check_convertible(self.checkpoint)


def find_sources(recipe: Recipe) -> Sources:
    """Locate and hash all that a recipe reads; what DVC tracks and is not here is pulled.

    Raises:
        CameraError: if something is missing or damaged.
    """
    _pull(Path(recipe.model))
    checkpoint = Checkpoint.open(local_checkpoint(recipe.model, recipe.revision))
    _check_shapes_once(checkpoint)
    names = {"config.json", *checkpoint.weight_files, *checkpoint.side_files}
    everything = digest_files(checkpoint.folder, names)
    hashes = {name: digest for name, digest in everything.items() if not _documents(name)}
    tokenizer = {name: hashes[name] for name in checkpoint.tokenizer_files}
    if not tokenizer:
        raise CameraError(f"{checkpoint.folder} has no tokenizer files (tokenizer.model or tokenizer.json)")
    commit: dict[str, Any] = {"revision": recipe.revision} if recipe.revision else {}

    def of_model(files: dict[str, str]) -> Input:
        return _input(checkpoint.folder, recipe.model, files, **commit)

    datasets: list[DatasetOptions] = [recipe.calibration, *recipe.evaluate.datasets]
    return Sources(
        checkpoint,
        model=of_model(hashes),
        folder=of_model(everything),
        tokenizer=_input(checkpoint.folder, recipe.model, tokenizer, tracked=False),
        files={str(each.path): _dataset(each.path) for each in datasets if each.path is not None},
        tasks=_task_inputs(recipe.evaluate),
    )


def _pull(path: Path) -> None:
    if not path.exists():
        versioning.pull_if_tracked(path)


def _input(path: Path, named: str, files: dict[str, str], *, tracked: bool = True, **about: Any) -> Input:
    """A source and what lineage records of it: its name in the recipe, sha256 of its files, its version in DVC."""
    if tracked and (version := versioning.tracked_version(path)) is not None:
        about["dvc"] = version
    return Input(path, digest_json(files), about={"path": named, "files": files, **about})


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
        return _input(path, str(path), digest_files(path, files_below(path)))
    if path.is_file():
        return _input(path, str(path), {path.name: digest_file(path)})
    raise CameraError(f"dataset {path} does not exist")


def _task_inputs(options: EvaluateOptions) -> dict[str, Input]:
    folder = options.task_folder
    if folder is None:
        return {}
    _pull(folder)
    names = {task: [path.name for path in task_files(task, folder).values()] for task in options.tasks}
    return {task: _input(folder, str(folder), digest_files(folder, files)) for task, files in names.items()}
