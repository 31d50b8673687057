"""One cell of the table: a model, a method, a ratio and a calibration seed. Measured once, and kept."""

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
from camera.evaluation.lm_eval_tasks import task_files
from camera.evaluation.tasks import evaluate_tasks
from camera.files import read_json, write_json
from camera.options import PruneOptions
from camera.pruning import prune_checkpoint

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
    """Parts of cells that were measured, a file each; a run that is killed loses the cell it was in."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        """`fresh` ignores what other runs kept."""
        self._folder, self._fresh = folder, fresh
        self._new: set[str] = set()

    def measured(self, cell: Cell, laboratory: Laboratory) -> dict[str, Any]:
        """A cell with all its parts; those not kept for the same weights, settings and options are measured and kept."""
        keys = {part: _key(cell, laboratory, part) for part in laboratory.parts}
        missing = [part for part, key in keys.items() if self._kept(key) is None]
        if missing:
            result = laboratory.measure(cell, missing)
            for part in missing:
                others = set(missing) - {part}
                own = {name: value for name, value in result.items() if name not in others}
                write_json(self._file(keys[part]), {"code": code_digest(), **vars(cell), **own})
                self._new.add(keys[part])
        found = self.find(cell, laboratory)
        assert found is not None, "its texts are kept by now"
        return found

    def find(self, cell: Cell, laboratory: Laboratory) -> dict[str, Any] | None:
        """What is kept of a cell, its tasks only where they are; None without its texts."""
        texts, *rest = (self._kept(_key(cell, laboratory, part)) for part in laboratory.parts)
        if texts is None:
            return None
        kept = [texts, *(part for part in rest if part is not None)]
        parts = {name: value for each in kept for name, value in each.items()}
        return {TASKS_PART: {}} | parts | {"codes": sorted({each["code"] for each in kept})}

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _kept(self, key: str) -> dict[str, Any] | None:
        if (self._fresh and key not in self._new) or not self._file(key).is_file():
            return None
        kept: dict[str, Any] = read_json(self._file(key))
        return kept


def code_digest() -> str:
    """Digest of the code that prunes, so that a table can say when its cells are of different code."""
    folder = Path(prune_checkpoint.__file__).parent
    return digest_json({path.name: digest_file(path) for path in sorted(folder.rglob("*.py"))})[:16]


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
