"""One cell of the table: a model, a method, a ratio and a calibration seed. Measured once, and kept in a file of lines."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from quality_leaks import Runs, all_runs
from quality_measure import Reference
from quality_methods import METHODS, pruned
from quality_subjects import Subject, shared_folder

from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.evaluation.lm_eval_tasks import task_files
from camera.evaluation.tasks import evaluate_tasks
from camera.options import PruneOptions
from camera.pruning import prune_checkpoint as stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"
TEXTS_PART, TASKS_PART = "texts", "tasks"
"""What is measured of a model. Kept apart, so that either can be measured again, or later, without the other."""
TASKS = ("arc_easy", "piqa")
_BATCH = 16
_ONLY_OF_OTHER = {TEXTS_PART: {"items"}, TASKS_PART: {"windows"}}
"""By part: settings that it does not depend on."""
_VERSION = 1
"""Raised when what a cell means changes."""


@dataclass(frozen=True)
class Settings:
    """How every cell is made and measured."""

    samples: int
    length: int
    """Tokens in a calibration window and in a held-out window."""
    windows: int
    items: int
    """Of each task; 0 leaves tasks out."""
    propagate: str


@dataclass(frozen=True)
class Cell:
    """The coordinates of one measurement."""

    model: str
    method: str
    ratio: float
    seed: int


class Laboratory:
    """One model with all that measuring it needs; nothing is loaded before it is needed."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self.subject = subject
        self.settings = settings
        self._calibrations: dict[int, tuple[torch.Tensor, int]] = {}

    @property
    def parts(self) -> list[str]:
        """What the settings ask to be measured, where its files are."""
        return [TEXTS_PART, TASKS_PART] if self.settings.items and self._task_files else [TEXTS_PART]

    def measure(self, cell: Cell, parts: list[str]) -> dict[str, Any]:
        """Make and measure a cell.

        Returns:
            By corpus loss and divergence (`texts`), by task one 0 or 1 an item (`tasks`); the FFN width kept, how often the
            tool refused to cut a layer as asked for, and the seconds that making and measuring took.

        Raises:
            CameraError: if calibration text holds held-out text, or a method fails.
        """
        began = perf_counter()
        refused = 0
        if cell.method == DENSE:
            model = self._dense
        else:
            prune = PruneOptions(ratio=cell.ratio, multiple_of=self.subject.multiple_of)
            method, mode = METHODS[cell.method], self.settings.propagate
            tokens_ST = self.calibration(cell.seed)[0]
            model, refused = pruned(self.subject.checkpoint, tokens_ST, method, prune, cell.seed, mode)
        made = perf_counter()
        measured: dict[str, Any] = {}
        if TEXTS_PART in parts:
            measured[TEXTS_PART] = {
                corpus: vars(reference.measure(model)) for corpus, reference in self._references.items()
            }
        if TASKS_PART in parts:
            measured[TASKS_PART] = self._answers(model)
        return {
            **measured,
            "refused": refused,
            "width": int(model.get_decoder().layers[0].mlp.down_proj.weight.shape[1]),
            "seconds": [round(made - began, 2), round(perf_counter() - made, 2)],
        }

    def calibration(self, seed: int) -> tuple[torch.Tensor, int]:
        """Calibration tokens of a seed, and how many windows were left out as they held held-out text."""
        if seed not in self._calibrations:
            self._calibrations[seed] = self.subject.calibrate(
                self.settings.samples, self.settings.length, seed, self._forbidden
            )
        return self._calibrations[seed]

    @cached_property
    def weights(self) -> str:
        """Digest of the model's files."""
        checkpoint = self.subject.checkpoint
        files = [*checkpoint.weight_files, *checkpoint.tokenizer_files, "config.json"]
        return digest_json([digest_file(checkpoint.folder / name) for name in files])

    def _answers(self, model: "PreTrainedModel") -> dict[str, str]:
        """By task, 1 or 0 for each item: whether the likeliest choice per character is the right one."""
        results = evaluate_tasks(
            model,
            TASKS,
            tokenizer=self.subject.tokenizer,
            limit=self.settings.items,
            task_folder=shared_folder() / "tasks",
            batch_size=_BATCH,
        )
        return {
            name: "".join("01"[int(right)] for right in result.headline(normalised=True).of_documents)
            for name, result in results.items()
        }

    @cached_property
    def _task_files(self) -> list[Path]:
        folder = shared_folder() / "tasks"
        if not folder.is_dir():
            return []
        return [path for task in TASKS for path in task_files(task, folder).values()]

    @cached_property
    def _forbidden(self) -> Runs:
        """Runs of words of the held-out texts and of every row of the tasks."""
        rows = [line for path in self._task_files for line in path.read_text(encoding="utf-8").splitlines()]
        return all_runs([*self.subject.held_out.values(), *rows])

    @cached_property
    def _dense(self) -> "PreTrainedModel":
        return self.subject.checkpoint.load_model(torch.float32)

    @cached_property
    def _references(self) -> dict[str, Reference]:
        return {
            corpus: Reference(
                self._dense, self.subject.windows(corpus, self.settings.windows, self.settings.length)
            )
            for corpus in self.subject.held_out
        }


class Store:
    """Parts of cells that were measured, one JSON object a line; a run that is killed loses the cell it was in."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        """`fresh` forgets what other runs kept."""
        self._path = path
        self._kept = {} if fresh else dict(_read(path))

    def measured(self, cell: Cell, laboratory: Laboratory) -> dict[str, Any]:
        """A cell with all its parts; those not kept for the same weights, settings and options are measured and kept."""
        parts = laboratory.parts
        missing = [part for part in parts if _key(cell, laboratory, part) not in self._kept]
        if missing:
            result = laboratory.measure(cell, missing)
            for part in missing:
                others = {other for other in missing if other != part}
                own = {name: value for name, value in result.items() if name not in others}
                self._keep(_key(cell, laboratory, part), {**vars(cell), **own})
        found = self.find(cell, laboratory)
        assert found is not None, "its texts are kept by now"
        return found

    def find(self, cell: Cell, laboratory: Laboratory) -> dict[str, Any] | None:
        """What is kept of a cell, its tasks only where they are; None without its texts."""
        keys = [_key(cell, laboratory, part) for part in laboratory.parts]
        if keys[0] not in self._kept:
            return None
        kept = [self._kept[key] for key in keys if key in self._kept]
        codes = sorted({each["code"] for each in kept})
        parts = {name: value for each in kept for name, value in each.items()}
        return {TASKS_PART: {}} | parts | {"codes": codes}

    def _keep(self, key: str, content: dict[str, Any]) -> None:
        kept = {"key": key, "code": code_digest(), **content}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(self._path)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._kept[key] = kept


def code_digest() -> str:
    """Digest of the code that prunes, so that a table can say when its cells are of different code."""
    folder = Path(stream.__file__).parent
    return digest_json({path.name: digest_file(path) for path in sorted(folder.glob("*.py"))})[:16]


def _key(cell: Cell, laboratory: Laboratory, part: str) -> str:
    method, settings = METHODS.get(cell.method), vars(laboratory.settings)
    identity = {
        "version": _VERSION,
        "weights": laboratory.weights,
        "settings": {name: value for name, value in settings.items() if name not in _ONLY_OF_OTHER[part]},
        "options": method.options if method else {},
        "corpora": sorted(laboratory.subject.held_out),
        "part": part,
        **vars(cell),
    }
    return digest_json(identity)


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            kept = json.loads(line)
            yield kept["key"], kept
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last line of a killed run may be cut short
                raise CameraError(
                    f"{path}, line {number} is not a cell of this benchmark: remove the file"
                ) from None


def _drop_cut_line(path: Path) -> None:
    """Remove what a killed run wrote of its last line, so that the next does not continue it."""
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
