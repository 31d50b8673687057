"""Accuracy of a model on tasks, by lm-eval: its prompts, its metrics, its standard errors; our engines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from pydantic import Field, ValidationError

from camera.checkpoints.tokenizer import load_tokenizer
from camera.devices import dtype_name, find_device
from camera.digests import digest_file, digest_folder, digest_json
from camera.errors import CameraError
from camera.evaluation.chance import chance_level
from camera.evaluation.lm_eval_tasks import lm_eval_version, open_task, task_files
from camera.evaluation.text_model import TextModel, open_text_model
from camera.files import read_json, write_json
from camera.options import EvaluateOptions
from camera.results import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TaskProgress = Callable[[str, int, int], None]
"""Called with (task, requests done, requests in all)."""


class Metric(Result):
    """One metric of one task."""

    value: float
    """Mean over documents."""
    standard_error: float | None
    """Of the mean; None if there is one document only."""
    of_documents: tuple[float, ...] = Field(repr=False)
    """Of each document, in order: 1 if it was answered rightly, else 0."""


class TaskResult(Result):
    """What was measured, on what, and with what."""

    task: str
    metrics: dict[str, Metric]
    """`acc`: the likeliest answer is the right one. `acc_norm`: the likeliest per character is."""
    documents: int
    few_shot: int
    """Examples before each question."""
    limit: int | None
    """Only so many documents were asked for; None: all."""
    prompts: str
    """Digest of all prompts, answers and targets: results with the same one answer the same questions."""
    chance: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Share that one who knows nothing answers rightly (`chance_level`); None in results of older versions."""
    task_version: str
    """Of the definition in lm-eval."""
    lm_eval: str
    """Version."""
    dtype: str
    """What the layers computed in."""
    device: str

    def headline(self, normalised: bool = False) -> Metric:
        """`acc`; if normalised `acc_norm` where the task has it."""
        return self.metrics["acc_norm"] if normalised and "acc_norm" in self.metrics else self.metrics["acc"]


class TaskSettings(TypedDict, total=False):
    """Those of `EvaluateOptions` that are about tasks, with its defaults."""

    few_shot: int
    """Examples before each question."""
    limit: int | None
    """Only the first so many documents of each task; None: all."""
    task_folder: Path | None
    """Where `<task>.<split>.jsonl` lie; None: documents come from the hub."""
    batch_size: int
    """Sequences computed at once; changes memory and speed, and results only by rounding."""
    dtype: str
    """As for `camera.loading.load_model`; a loaded model keeps its own."""
    device: str
    """The same."""
    layer_by_layer: bool | None
    """See `open_text_model`."""


def evaluate_tasks(
    model: "TextModel | PreTrainedModel | Path | str",
    tasks: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | Path | None" = None,
    out: Path | None = None,
    progress: TaskProgress = lambda task, done, total: None,
    **settings: Unpack[TaskSettings],
) -> dict[str, TaskResult]:
    """Measure a model on tasks, one after the other.

    Args:
        model: what `open_text_model` opens: a checkpoint, a quantised folder, a GGUF, or a transformers model on its
            device, in eval mode.
        tasks: as lm-eval calls them; see `NINE_TASKS`.
        tokenizer: the model's, or a folder that has it. May be left out where `model` is a folder.
        out: folder for `<task>.json`, each written when its task is done. Tasks that are there already are not
            measured again, so that what was killed goes on. For models given by their place only.
        progress: called with (task, requests done, requests in all).
        settings: few_shot, limit, task_folder, batch_size, dtype, device,
            layer_by_layer: see `TaskSettings`.

    Returns:
        By task, in the order asked for.

    Raises:
        CameraError: if lm-eval, a task or its files are missing, `out` holds results of something else, or the model
            computes NaN. Its kind NetworkError if the hub is needed and does not answer.
    """
    options = EvaluateOptions.model_validate({**settings, "tasks": tuple(dict.fromkeys(tasks))})
    if options.task_folder is not None:
        for name in options.tasks:
            task_files(name, options.task_folder)  # what is missing is said before anything is measured
    asked = {} if out is None else _asked(model, options)
    found = {
        name: result
        for name in options.tasks
        if out is not None
        and (path := out / f"{name}.json").is_file()
        and (result := _resumed(path, asked[name])) is not None
    }
    missing = [name for name in options.tasks if name not in found]
    if missing:
        reader = _tokenizer(model, tokenizer)
        opened = open_text_model(model, options.dtype, options.device, options.layer_by_layer)
        for name in missing:
            found[name] = _measure(opened, reader, name, options, progress)
            if out is not None:
                content = {"asked": asked[name], **found[name].model_dump(mode="json")}
                write_json(out / f"{name}.json", {**content, "checksum": digest_json(content)})
    return {name: found[name] for name in options.tasks}


def _asked(model: "TextModel | PreTrainedModel | Path | str", options: EvaluateOptions) -> dict[str, str]:
    """For each task a digest of all that decides its result."""
    if not isinstance(model, (str, Path)):
        raise CameraError(
            "a model in memory has no identity to resume by: leave `out` away, or give its folder"
        )
    place = Path(model)
    how = {
        "model": digest_file(place) if place.is_file() else digest_folder(place),
        "few_shot": options.few_shot,
        "limit": options.limit,
        "dtype": options.dtype,
        "device": find_device(options.device).type,
        "lm_eval": lm_eval_version(),
    }
    digests = {}
    for name in options.tasks:
        files = {} if options.task_folder is None else task_files(name, options.task_folder)
        data = {split: digest_file(path) for split, path in files.items()}
        digests[name] = digest_json({**how, "task": name, "data": data})
    return digests


def read_task_result(path: Path) -> TaskResult:
    """Read one task's JSON.

    Raises:
        CameraError: if it is missing, or is not one.
    """
    content = read_json(path)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in ("asked", "checksum")}
    try:
        return TaskResult.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CameraError(f"{path} is no result of a task ({where}): remove it and measure again") from None


def _measure(
    model: TextModel,
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    options: EvaluateOptions,
    progress: TaskProgress,
) -> TaskResult:
    with open_task(name, options.task_folder, options.few_shot) as task:
        # After open_task, which says what is wrong if lm-eval is not installed; and these imports take seconds.
        from lm_eval.evaluator import evaluate

        from camera.evaluation.language_model import CameraLM

        language_model = CameraLM(
            model, tokenizer, options.batch_size, lambda done, total: progress(name, done, total)
        )
        measured: Any = evaluate(language_model, {"tasks": {name: task}}, limit=options.limit)
    values, documents = measured["results"][name], measured["samples"][name]
    metrics = {
        metric: Metric(
            value=values[f"{metric},none"],
            standard_error=error if isinstance(error := values.get(f"{metric}_stderr,none"), float) else None,
            of_documents=tuple(float(document[metric]) for document in documents),
        )
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in values
    }
    if "acc" not in metrics:
        raise CameraError(f"task {name} does not measure accuracy (acc): choose another")
    return TaskResult(
        task=name,
        metrics=metrics,
        documents=len(documents),
        few_shot=options.few_shot,
        limit=options.limit,
        prompts=digest_json([[document["arguments"], str(document["target"])] for document in documents]),
        chance=chance_level(
            [[answer for _, answer in document["arguments"]] for document in documents],
            [str(document["target"]) for document in documents],
        ),
        task_version=str(measured["versions"].get(name)),
        lm_eval=lm_eval_version(),
        dtype=dtype_name(model.dtype),
        device=str(model.device),
    )


def _tokenizer(
    model: "TextModel | PreTrainedModel | Path | str", given: "PreTrainedTokenizerBase | Path | None"
) -> "PreTrainedTokenizerBase":
    if given is not None and not isinstance(given, (str, Path)):
        return given
    folder = given if given is not None else model
    if not isinstance(folder, (str, Path)) or Path(folder).is_file():
        raise CameraError("tasks are text: name the folder with the model's tokenizer")
    return load_tokenizer(Path(folder))


def _resumed(path: Path, asked: str) -> TaskResult | None:
    """What was measured before; None if it was changed since."""
    result, content = read_task_result(path), read_json(path)
    if content.get("asked") != asked:
        raise CameraError(
            f"{path} holds the result of another model or other options: choose another folder, or remove it"
        )
    checksum = content.pop("checksum", None)
    return result if checksum == digest_json(content) else None
