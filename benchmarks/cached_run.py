"""How long a run takes that finds everything in the store: `python benchmarks/cached_run.py`.

Runs the demo recipe, small, once for real and then, everything cached, without Prefect and through it; beside that a
flow that does nothing, which is Prefect's own start-up. Prints seconds on the clock and of CPU time (this process and
the API that it starts): on a machine that others use only the CPU time can be compared.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

from common import (
    ROOT,
    TINY_OPENPANGU,
    Seconds,
    clock,
    cpu,
    in_turns,
    parser_of,
    save,
    show,
    span,
    timed_command,
)

SMALL = (
    *("calibration.samples=4", "calibration.length=128", "evaluate.window=128", "evaluate.max_windows=4"),
    *("benchmark.decode=[8]", "benchmark.repeats=2", "publish.dvc=false"),
)
TO_REACH = 3.0
THROUGH, ALONE = "everything cached, through Prefect", "Prefect alone: a flow that does nothing"
NOTHING = (
    "from tasks.project import Project; Project.here().configure()\n"
    "from flows.local_api import start_local_api; start_local_api()\n"
    "from prefect import flow\n"
    "flow(name='nothing')(lambda: None)()\n"
)


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument("--model", type=Path, default=TINY_OPENPANGU)
    arguments = parser.parse_args()
    run = [sys.executable, "-m", "camera", "run", str(ROOT / "recipes" / "demo.yaml")]
    run += [f"--set={override}" for override in (f"model={arguments.model.resolve()}", *SMALL)]
    commands = {
        "everything cached, --no-prefect": [*run, "--no-prefect"],
        THROUGH: run,
        ALONE: [sys.executable, "-c", NOTHING],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The first turn, which is not counted, makes the artifacts, Prefect's records and its database.
        works = {case: partial(timed_command, command, folder) for case, command in commands.items()}
        times: dict[str, list[Seconds]] = in_turns(works, arguments.repeats)
    times["above Prefect alone"] = [
        (through[0] - alone[0], through[1] - alone[1])
        for through, alone in zip(times[THROUGH], times[ALONE], strict=True)
    ]
    found = {case: (clock(taken), cpu(taken)) for case, taken in times.items()}
    show(
        f"median of {arguments.repeats} turns",
        "| clock s | spread | CPU s | spread",
        (
            [case, *(cell for spread in both for cell in (f"{spread.median:.1f}", span(spread, 1)))]
            for case, both in found.items()
        ),
    )
    above = found["above Prefect alone"][0].median
    print(f"to reach: at most {TO_REACH:.0f} s above: {'met' if above <= TO_REACH else 'NOT met'}")
    cases = {case: {"clock_s": one, "cpu_s": two} for case, (one, two) in found.items()}
    save(arguments.json, to_reach_s=TO_REACH, cases=cases)


if __name__ == "__main__":
    main()
