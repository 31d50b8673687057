"""What the benchmarks share: their command line, work timed in turns or in a process of its own, tables and JSON."""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table

from camera.benchmark.report import Spread
from camera.devices import describe_device
from camera.files import write_json

ROOT = Path(__file__).resolve().parent.parent
TINY_OPENPANGU = ROOT / "data" / "models" / "tiny-openpangu"
Seconds = tuple[float, float]
"""On the clock, and of CPU time: on a machine that others use only CPU time can be compared."""
T = TypeVar("T")


def parser_of(text: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the script's text, `--json`, and an option for each default: a number, or a list."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        many: dict[str, Any] = {"nargs": "+"} if isinstance(value, list) else {}
        kind = type(value[0] if many else value)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=value, help="(default: %(default)s)", **many)
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="also write everything measured to this file"
    )
    return parser


def random_tokens(vocab: int, samples: int, length: int) -> torch.Tensor:
    """int64 [samples, length], always the same."""
    return torch.randint(vocab, (samples, length), generator=torch.Generator().manual_seed(0))


def in_turns(works: Mapping[str, Callable[[], T]], repeats: int, warm_up: bool = True) -> dict[str, list[T]]:
    """What each work gives, in turns, the order reversed every other turn; a first turn of all is not counted.

    A busy minute of the machine so falls on all of them, and those of one turn can be compared.
    """
    found: dict[str, list[T]] = {name: [] for name in works}
    for turn in range(-1 if warm_up else 0, repeats):
        backwards = turn > 0 and turn % 2 == 1
        for name in list(works)[:: -1 if backwards else 1]:
            result = works[name]()
            if turn >= 0:
                found[name].append(result)
    return found


def timed(work: Callable[[], Any]) -> Seconds:
    """Seconds that a call takes, CPU seconds of this process alone."""
    before, began = _cpu(resource.RUSAGE_SELF), perf_counter()
    work()
    return perf_counter() - began, _cpu(resource.RUSAGE_SELF) - before


def timed_command(command: Sequence[str], folder: Path) -> Seconds:
    """Seconds that a command takes, with all that it starts and waits for."""
    before, began = _cpu(resource.RUSAGE_CHILDREN), perf_counter()
    printed_by(command, folder)
    return perf_counter() - began, _cpu(resource.RUSAGE_CHILDREN) - before


def printed_by(command: Sequence[str], folder: Path) -> str:
    """What a command prints that runs in a folder, without our environment variables; ends with its messages if it fails."""
    ours = ("PREFECT_", "MLFLOW_", "CAMERA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, cwd=folder, env={**kept, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command[:6]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def apart(work: Callable[..., T], *given: Any) -> T:
    """What a function gives in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def clock(times: Iterable[Seconds]) -> Spread:
    """Of the seconds on the clock."""
    return Spread.of([seconds for seconds, _ in times])


def cpu(times: Iterable[Seconds]) -> Spread:
    """Of the CPU seconds."""
    return Spread.of([seconds for _, seconds in times])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, turn by turn."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def span(spread: Spread, digits: int = 2) -> str:
    """Smallest to largest."""
    return f"{spread.low:.{digits}f} to {spread.high:.{digits}f}"


def met(reached: bool | None) -> str:
    """For the last column of a table."""
    return "met" if reached else "MISSED"


def show(title: str, columns: str, lines: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table; the names of its columns are separated by `|`, and all but the first `left` hold numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns.split("|")):
        table.add_column(column.strip(), justify="left" if number < left else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def save(path: Path | None, **content: Any) -> None:
    """Write JSON where it was asked for, with the machine that it was measured on."""
    if path is not None:
        device = describe_device(torch.device("cpu"))
        write_json(path, to_jsonable_python({"device": device, **content}))


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime
