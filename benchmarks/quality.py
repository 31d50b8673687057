"""What pruning loses, by method, at one and the same size: perplexity, divergence from the dense model, and tasks.

    python benchmarks/quality.py --json quality.json --plot quality.png
    python benchmarks/quality.py --quick
    python benchmarks/quality.py --models stories260k --methods "camera 0.95" refit --ratios 0.4

Four trained models of different family, shape, corpus and tokenizer; each is calibrated on one text, and measured on
held-out text of the same domain (own) and of another (other). `±` is the standard deviation over calibration seeds, for tasks
the standard error over items, and Δ is the paired difference from CAMERA-P on the same items. `recovered` is the share of
CAMERA-P's loss in ln perplexity (alpha 0.95, the published method) that a method does not lose.

No calibration window shares a run of 13 words with any text that is measured on; this is checked before a window is used.

Every cell is kept as soon as it is measured: a killed run goes on where it was. Models and texts that are not in
the repository are found by CAMERA_SHARED_DATA, else in ../shared/data; what is absent is skipped by name. The third model is
trained where it is absent, in about ten minutes; the fourth is SmolLM2-135M, an hour and more at all ratios. Exit status 1 says that a goal was missed.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import ROOT, parser_of, save
from quality_cells import DENSE, Cell, Laboratory, Settings, Store, code_digest
from quality_leaks import RUN
from quality_methods import BASELINE, METHODS
from quality_plot import draw
from quality_subjects import SUBJECTS, Folders
from quality_table import best_method, goals_of, rows_of, table_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from camera.errors import CameraError

STATE = ROOT / ".camera" / "quality"
_WIDTH = 210


def main() -> int:
    """Run the command; 2 is a mistake of the user's, 1 says that a goal was missed."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()  # every cell loads a model
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        laboratories = _laboratories(arguments)
        dense, cells = measure(laboratories, arguments)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {arguments.cells}", file=sys.stderr)
        return 130
    rows = [row for name, found in cells.items() for row in rows_of(name, dense[name], found)]
    console.print(table_of(dense, rows, arguments.markdown))
    subjects = [laboratory.subject for laboratory in laboratories]
    method = arguments.judge or best_method(rows)
    goals = goals_of(subjects, rows, method) if method else []
    for line in [*_about(laboratories, cells, arguments), *map(str, goals)]:
        console.print(line, highlight=False, soft_wrap=True)
    save(
        arguments.json,
        code=code_digest(),
        settings=asdict(laboratories[0].settings),
        seeds=arguments.seeds,
        texts={subject.name: subject.sources for subject in subjects},
        dense={name: {"texts": cell["texts"], "width": cell["width"]} for name, cell in dense.items()},
        rows=[asdict(row) for row in rows],
        goals=[{**asdict(goal), "met": goal.met} for goal in goals],
    )
    if arguments.plot and rows:
        draw(rows, {subject.name: subject.sources for subject in subjects}, arguments.plot)
    return 0 if all(goal.met is not False for goal in goals) else 1


def measure(
    laboratories: list[Laboratory], arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Every model's dense result, and its cells; those that the store holds are not measured again.

    Raises:
        CameraError: as `Laboratory.measure`; or if only what is kept is wanted, and that is nothing.
    """
    store = Store(arguments.cells, arguments.fresh)
    dense: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    todo = {laboratory: _cells(laboratory.subject.name, arguments) for laboratory in laboratories}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=sum(map(len, todo.values())))
        for laboratory, cells in todo.items():
            for cell in cells:
                ratio = f" {cell.ratio:g} seed {cell.seed}" if cell.ratio else ""
                progress.update(bar, description=f"{cell.model}: {cell.method}{ratio}")
                find = store.find if arguments.kept else store.measured
                if (result := find(cell, laboratory)) is not None:
                    if cell.method == DENSE:
                        dense[cell.model] = result
                    elif cell.model in dense:
                        found.setdefault(cell.model, []).append(result)
                progress.advance(bar)
    if not found:
        raise CameraError(f"{arguments.cells} keeps none of these cells: run without --kept")
    return dense, found


def _cells(model: str, arguments: argparse.Namespace) -> list[Cell]:
    """Seed by seed, so that a run that is stopped has a whole table of fewer seeds."""
    cells = [Cell(model, DENSE, 0.0, 0)]
    for seed in arguments.seeds:
        for ratio in arguments.ratios:
            for name in METHODS:
                wanted = name in arguments.methods or name == BASELINE
                if wanted and (METHODS[name].seeded or seed == arguments.seeds[0]):
                    cells.append(Cell(model, name, ratio, seed))
    return cells


def _laboratories(arguments: argparse.Namespace) -> list[Laboratory]:
    settings = Settings(
        arguments.samples, arguments.length, arguments.windows, arguments.items, arguments.propagate
    )
    found, folders = [], Folders(arguments.third, arguments.smollm2)
    for name in arguments.models:
        try:
            found.append(Laboratory(SUBJECTS[name](folders), settings))
        except CameraError as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
    if not found:
        raise CameraError("no model is left to measure")
    return found


def _about(
    laboratories: list[Laboratory], cells: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace
) -> list[str]:
    """What the numbers are of."""
    lines = []
    for laboratory in laboratories:
        subject = laboratory.subject
        texts = "; ".join(f"{corpus}: {source}" for corpus, source in subject.sources.items())
        left_out = [laboratory.calibration(seed)[1] for seed in arguments.seeds]
        lines.append(
            f"{subject.name}: {texts}. No calibration window shares {RUN} words with text that is measured on "
            f"(checked; left out before: {', '.join(map(str, left_out))} windows)."
        )
    refused = [cell for found in cells.values() for cell in found if cell["refused"]]
    lines += [
        f"{cell['model']}, {cell['ratio']:.0%}, seed {cell['seed']}: {cell['method']} was refused in {cell['refused']} cuts of a layer"
        for cell in refused
    ]
    codes = {code for found in cells.values() for cell in found for code in cell["codes"]}
    if codes != {code_digest()}:
        lines.append(
            f"Cells were measured by {len(codes)} version(s) of the pruning code, not all by the present one: "
            f"--fresh, or remove {arguments.cells}, to measure all again."
        )
    return lines


def _arguments() -> argparse.Namespace:
    counts = {"samples": 64, "length": 256, "windows": 32, "items": 100}
    threads = torch.get_num_threads()
    parser = parser_of(__doc__, ratios=[0.2, 0.4, 0.5], seeds=[0, 1, 2], **counts, threads=threads)
    add = parser.add_argument
    add("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="which (default: all)")
    several: dict[str, Any] = {
        "nargs": "+",
        "metavar": "METHOD",
        "choices": METHODS,
        "default": list(METHODS),
    }
    add("--methods", **several, help=f"{', '.join(METHODS)} (default: all); CAMERA-P always is")
    add("--judge", choices=METHODS, metavar="METHOD", help="hold this to the goals (default: the best)")
    add(
        "--propagate", choices=("sequential", "one-shot"), default="sequential", help="(default: %(default)s)"
    )
    add(
        "--quick",
        action="store_true",
        help="one seed, one ratio, few tokens; the third model only if it exists, and not SmolLM2",
    )
    add("--third", type=Path, default=STATE / "third", help="folder of the third model (default: in .camera)")
    add(
        "--smollm2",
        type=Path,
        default=STATE / "smollm2",
        help="folder of SmolLM2, imported from its package where it is absent (default: in .camera)",
    )
    add(
        "--cells",
        type=Path,
        default=STATE / "cells",
        help="folder of measured cells (default: in .camera)",
    )
    add("--kept", action="store_true", help="measure nothing: print what was measured before")
    add("--fresh", action="store_true", help="measure every cell again")
    add("--plot", type=Path, help="write a PNG here")
    add("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.ratios = arguments.seeds[:1], [0.4]
        arguments.samples, arguments.windows, arguments.items = 16, 8, min(24, arguments.items)
        left_out = {"smollm2"} if arguments.third.exists() else {"smollm2", "third"}
        arguments.models = [name for name in arguments.models if name not in left_out]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
