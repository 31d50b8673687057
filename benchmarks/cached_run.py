"""How long a run takes that finds everything in the store: `python benchmarks/cached_run.py`.

Runs the demo recipe, small, once for real and then, everything cached, without Prefect and through it; beside that a
flow that does nothing, which is Prefect's own start-up. Prints seconds on the clock and of CPU time (this process and
the API that it starts): on a machine that others use only the CPU time can be compared.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from camera.benchmark.report import Spread
from camera.files import write_json

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = (
    *("calibration.samples=4", "calibration.length=128", "evaluate.window=128", "evaluate.max_windows=4"),
    *("benchmark.decode=[8]", "benchmark.repeats=2", "publish.dvc=false"),
)
TO_REACH = 3.0
NOTHING = (
    "from tasks.project import Project; Project.here().configure()\n"
    "from flows.local_api import start_local_api; start_local_api()\n"
    "from prefect import flow\n"
    "flow(name='nothing')(lambda: None)()\n"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "data" / "models" / "tiny-openpangu")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"model={arguments.model.resolve()}", *SMALL]
        run = [sys.executable, "-m", "camera", "run", str(REPOSITORY / "recipes" / "demo.yaml")]
        run += [part for override in overrides for part in ("--set", override)]
        timed([*run, "--no-prefect"], folder)
        timed(run, folder)  # Prefect's records, and its database, are made
        cases = {
            "everything cached, --no-prefect": [*run, "--no-prefect"],
            "everything cached, through Prefect": run,
            "Prefect alone: a flow that does nothing": [sys.executable, "-c", NOTHING],
        }
        # One after the other in turn, so that a busy minute falls on all of them.
        times = [
            {case: timed(command, folder) for case, command in cases.items()}
            for _ in range(arguments.repeats)
        ]
    found = {case: [Spread.of([one[case][i] for one in times]) for i in (0, 1)] for case in cases}
    (_, through, alone) = cases
    # Of each turn by itself: its two were run one after the other.
    found["above Prefect alone"] = [
        Spread.of([one[through][i] - one[alone][i] for one in times]) for i in (0, 1)
    ]
    table = Table(title=f"median of {arguments.repeats} turns", title_justify="left")
    for column in ("", "clock s", "spread", "CPU s", "spread"):
        table.add_column(column, justify="right" if column else "left")
    for case, spreads in found.items():
        table.add_row(
            case,
            *(cell for one in spreads for cell in (f"{one.median:.1f}", f"{one.low:.1f} to {one.high:.1f}")),
        )
    console = Console()
    console.print(table)
    clock = found["above Prefect alone"][0]
    console.print(
        f"to reach: at most {TO_REACH:.0f} s above: {'met' if clock.median <= TO_REACH else 'NOT met'}"
    )
    if arguments.json:
        both = {
            case: {"clock_s": one.model_dump(), "cpu_s": two.model_dump()}
            for case, (one, two) in found.items()
        }
        write_json(arguments.json, {"to_reach_s": TO_REACH, "cases": both})


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds on the clock and of CPU that a command takes, with all that it starts and waits for."""
    ours = ("PREFECT_", "MLFLOW_", "CAMERA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    before, began = _cpu(), time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env={**kept, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command[:6]} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - began, _cpu() - before


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
