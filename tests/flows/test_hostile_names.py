"""No command lets a name write a line of its answer, steer the terminal, or be markup: every command, every hostile name."""

import csv
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml

from camera.cli import _run, command_line
from camera.escape import one_line
from tests.flows.conftest import Workplace
from tests.hostile import NAMES

FORGED = re.compile(r"^[\s│├└─]*(?:✓ verified(?!:)|✓ signature  by alice|# heading|\| a \|)", re.MULTILINE)
"""Lines that only a hostile name could have written."""

Make = Callable[[str], list[str]]

MISSING: dict[str, Make] = {
    "run": lambda name: ["run", name, "--no-prefect", "--set", name],
    "plan": lambda name: ["plan", name],
    "sweep": lambda name: ["sweep", name, "--no-prefect", "--set", name],
    "serve": lambda name: ["serve", "--pool", name, "--webhook", name],
    "automations": lambda name: ["automations", "--webhook", name],
    "runs": lambda name: ["runs", name],
    "show": lambda name: ["show", name],
    "sign": lambda name: ["sign", name, "--key", name],
    "promote": lambda name: ["promote", name, "--alias", name],
    "rollback": lambda name: ["rollback", name, "--alias", name],
    "audit": lambda name: ["audit", name, "--signers", name],
    "diff": lambda name: ["diff", name, name],
    "gc": lambda name: ["gc", "--older-than", name],
    "doctor": lambda name: ["doctor", name],
    "npu-check": lambda name: ["npu-check", "--size", name],
    "import": lambda name: ["import", name, name],
    "capture": lambda name: ["capture", name, name, "--calibration", name],
    "score": lambda name: ["score", name, name, name],
    "prune": lambda name: ["prune", name, name, "--calibration", name],
    "save": lambda name: ["save", name, name, name],
    "imatrix": lambda name: ["imatrix", name, name, "--calibration", name],
    "quantize": lambda name: ["quantize", name, name, "--type", name],
    "convert": lambda name: ["convert", name, name],
    "evaluate": lambda name: ["evaluate", name, "--text", name],
    "bench": lambda name: ["bench", name, "--engine", name],
}
"""What each command is told of a file, a model or a value that has such a name."""


def commands() -> set[str]:
    return set(typer.main.get_command(command_line()).commands)  # type: ignore[attr-defined]


def test_every_command_is_among_those_that_are_tried():
    assert set(MISSING) == commands()


def usable(name: str) -> bool:
    """Whether an argument of a process can be this at all."""
    return "\x00" not in name and not re.search("[\ud800-\udc7f\udd00-\udfff]", name)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("bench", "evaluate") else [])
        for name in sorted(MISSING)
    ],
)
def test_a_name_on_the_command_line_is_shown_as_it_is_spelt(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        os, "environ", {**os.environ, "CAMERA_HOME": str(tmp_path / ".camera"), "COLUMNS": "100"}
    )
    for number, name in enumerate(filter(usable, NAMES)):
        monkeypatch.setattr(sys, "argv", ["camera", *MISSING[command](name)])
        try:
            code = _run()
        except Exception as error:  # the traceback that `camera` prints itself
            raise AssertionError(
                f"{ascii(name)[:80]}: {type(error).__name__} {ascii(str(error))[:200]}"
            ) from error
        told = capsys.readouterr()
        assert code in (0, 1, 2, 3), number
        harmless(told.out + told.err)


def harmless(told: str) -> None:
    """Hold what was printed, on no terminal, to being lines of ours."""
    for line in told.split("\n"):
        assert line == one_line(line), ascii(line)
    assert not FORGED.search(told), told[:2000]


TEXT = "held ✓ verified | <script>alert(1) [red]x[x] `c` **b** 'q' # h"
"""The name of a text, which becomes a heading of tables."""
STEERING = "x\x1b[2J\n✓ verified\u202e"
"""A name that no lineage takes."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_of_hostile_names_makes_no_line_no_sequence_and_no_markup_anywhere(workplace: Workplace):
    """Run, published, tracked and looked at by every command that shows what there is."""
    folder = workplace.folder
    (folder / "held-out.txt").rename(folder / f"{TEXT}.txt")
    recipe = yaml.safe_load(workplace.recipe.read_text())
    recipe["evaluate"]["datasets"][0]["path"] = f"{TEXT}.txt"
    workplace.recipe.write_text(yaml.safe_dump(recipe))
    told = [workplace.camera("run", "recipe.yaml", "--no-prefect")]
    (folder / STEERING).write_text("text " * 2000)
    steering = f"evaluate.datasets=[{{name: file, path: {json.dumps(STEERING)}}}]"
    for command in ("plan", "run"):
        way = ["--no-prefect"] if command == "run" else []
        refused = workplace.camera(command, "recipe.yaml", *way, "--set", steering, check=False)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "running" not in refused.stdout, "refused before the first step"
        told.append(refused)
    published = folder / "published" / "tiny"
    (published / STEERING).write_text("nobody's")
    for command in (
        *(
            ["plan", "recipe.yaml"],
            ["runs"],
            ["show", "tiny"],
            ["audit", "published/tiny"],
            ["audit", "--all"],
        ),
        *(["diff", "published/tiny", "published/tiny"], ["gc", "--dry-run"], ["promote", "tiny"], ["doctor"]),
        *(["runs", "--json"], ["show", "tiny", "--json"], ["audit", "tiny", "--json"]),
    ):
        told.append(workplace.camera(*command, check=False))
    for done in told:
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        harmless(done.stdout + done.stderr)
    card, page = ((published / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    harmless(card)
    assert re.search(r"(?<!\\)<script", card) is None
    heading = next(line for line in card.splitlines() if line.startswith("| model | type"))
    assert len(re.findall(r"(?<!\\)\|", heading)) == 7, "a name adds no column"
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    [table] = workplace.store.glob("report/*/results.csv")
    rows = list(csv.reader(table.open(encoding="utf-8")))
    assert {len(row) for row in rows} == {4}
    with sqlite3.connect(folder / ".camera" / "mlflow.db") as database:
        for table, columns in (
            ("metrics", "key"),
            ("params", "key"),
            ("tags", "key"),
            ("runs", "name"),
            ("datasets", "name"),
        ):
            for (name,) in database.execute(f"select {columns} from {table}"):
                assert name == one_line(name), ascii(name)
