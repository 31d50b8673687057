"""The tasks of lm-eval: its own definitions, with documents from the hub or from files of the user's.

A file `<task>.<split>.jsonl` holds the rows of one split of the task's data set, with their own field names. Prompt,
choices, target and metrics are always those of the definition that is installed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import yaml

from camera.errors import CameraError, NetworkError
from camera.files import copy_file

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FEW_SHOT_SEED = 1234
"""lm-eval's default: which documents are shown as examples."""
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class _Definition:
    """Where the installed definition lies, and on which split it measures."""

    file: str
    split: Literal["validation", "test"]


_DEFINITIONS = {
    "boolq": _Definition("super_glue/boolq/default.yaml", "validation"),
    "openbookqa": _Definition("openbookqa/openbookqa.yaml", "test"),
    "rte": _Definition("glue/rte/default.yaml", "validation"),
    "arc_easy": _Definition("arc/arc_easy.yaml", "test"),
    "winogrande": _Definition("winogrande/default.yaml", "validation"),
    "hellaswag": _Definition("hellaswag/hellaswag.yaml", "validation"),
    "arc_challenge": _Definition("arc/arc_challenge.yaml", "test"),
    "piqa": _Definition("piqa/piqa.yaml", "validation"),
    "mathqa": _Definition("mathqa/mathqa.yaml", "test"),
}
NINE_TASKS = tuple(_DEFINITIONS)
"""What the Ascend version of CAMERA measures, in its order."""


def lm_eval_version() -> str:
    """The version of lm-eval that is installed.

    Raises:
        CameraError: if there is none.
    """
    try:
        return version("lm_eval")
    except ModuleNotFoundError:
        raise CameraError(
            "tasks are measured by lm-eval, which is not installed: pip install 'camera-npu[tasks]'"
        ) from None


def task_files(name: str, folder: Path) -> dict[str, Path]:
    """The files of a task in a folder, by split.

    Raises:
        CameraError: if the task is not one that can be read from files, or the split that it measures on is not there.
    """
    if name not in _DEFINITIONS:
        raise CameraError(
            f"task {name} cannot be read from files, only {', '.join(NINE_TASKS)} can: leave the task folder out"
        )
    files = {split: path for split in _SPLITS if (path := folder / f"{name}.{split}.jsonl").is_file()}
    if (split := _DEFINITIONS[name].split) not in files:
        raise CameraError(
            f"{folder / f'{name}.{split}.jsonl'} is missing: task {name} measures on its {split} split"
        )
    return files


@contextmanager
def open_task(name: str, folder: Path | None = None, few_shot: int = 0) -> Iterator["Task"]:
    """One task with its documents, ready for `lm_eval.evaluator.evaluate`.

    Args:
        name: as lm-eval calls it.
        folder: where its files are; None: from the hub, as the definition says, or from the hub's cache.
        few_shot: examples before every question. They come from the training split, else from the validation split,
            else from the split that is measured, of which the question itself is left out.

    Raises:
        CameraError: if there is no such task, its files are missing or no rows of it, or it is no single task.
        NetworkError: if the hub does not answer.
    """
    lm_eval_version()
    with TemporaryDirectory(prefix="camera-task-") as scratch, _quiet():
        if folder is None:
            definition = str(_installed(name)) if name in _DEFINITIONS else name
        else:
            definition = str(_offline_definition(name, folder.resolve(), Path(scratch)))
        task = _load(name, definition, folder)
        task.set_config("num_fewshot", few_shot)
        task.set_fewshot_seed(FEW_SHOT_SEED)
        yield task


def _load(name: str, definition: str, folder: Path | None) -> "Task":
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager  # five seconds; only tasks need it

    # Reading every definition to find one takes half a minute, so only what is not one of the nine does that.
    manager = TaskManager(include_defaults=definition == name)
    try:
        found: dict[str, Any] = manager.load([definition])["tasks"]
    except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
        raise NetworkError(
            f"task {name}: its data set could not be fetched ({error}). Without a network, give a folder of its files"
        ) from error
    except (
        DatasetGenerationError,
        DatasetsError,
        TemplateError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        if definition == name and name not in manager.all_tasks:
            raise CameraError(
                f"lm-eval {lm_eval_version()} has no task {name}: `lm-eval ls tasks` lists them"
            ) from None
        where = "from the hub" if folder is None else f"from {folder}"
        raise CameraError(f"task {name} cannot be read {where}: {error}") from error
    if list(found) != [name]:
        raise CameraError(f"{name} is a group of {len(found)} tasks: name the tasks themselves")
    return found[name]


def _offline_definition(name: str, folder: Path, scratch: Path) -> Path:
    """Write a definition that is the installed one except for where its documents are."""
    files = {}
    for split, path in task_files(name, folder).items():
        files[split] = scratch / path.name  # the library opens it by itself
        copy_file(path, files[split])
    changes: dict[str, Any] = {
        "include": str(_installed(name)),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(scratch / "cache"),
        },
        "training_split": "train" if "train" in files else None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if _DEFINITIONS[name].split == "test" else None,
    }
    if list(files) == ["test"]:
        # Without this lm-eval would show a question and its answer as an example before that very question.
        changes["fewshot_split"] = "test"
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(changes), encoding="utf-8")
    return path


def _installed(name: str) -> Path:
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / _DEFINITIONS[name].file
    if not path.is_file():
        raise CameraError(
            f"lm-eval {lm_eval_version()} has no {path}: install the version in constraints.txt"
        )
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what lm-eval and datasets say on the error stream while all is well; bars are ours."""
    import datasets
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    level, bars = logger.level, datasets.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
