"""The report of a sweep: who lies on the front, what is drawn, and what became of members that failed."""

import csv
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from camera.report.gate import Gate, Requirement
from camera.report.schema import Accuracy, ModelRow, Perplexity, Results
from camera.report.sweep import (
    MemberResults,
    SweepResults,
    best_member,
    collect_sweep,
    front,
    read_sweep,
    summary,
)
from camera.report.sweep_page import (
    csv_rows,
    render_sweep,
    sweep_markdown,
    sweep_table,
    write_sweep,
)
from tests.camera.report.test_html import HOSTILE, Page

SCORE = Perplexity(value=10, change=0.0, tokens=1, window=1, dtype="float32")


def model(id: str, size: int, perplexity: float) -> ModelRow:
    score = SCORE.model_copy(update={"value": perplexity, "change": perplexity / 10 - 1})
    return ModelRow(id=id, title=id, bytes=size, perplexity={"held-out": score})


def found(size: int, perplexity: float, limit: float | None = None) -> Results:
    """Results of a member beside an original of 1000 bytes and a baseline of 300."""
    product = model("pruned+quantized", size, perplexity)
    gate = None
    if limit is not None:
        change = product.perplexity["held-out"].change
        requirement = Requirement(name="perplexity_increase", of="held-out", limit=limit, found=change)
        gate = Gate(requirements=(requirement,))
    return Results(
        name="x", base_model="source", model_type="llama", layers=1, hidden_size=1, recipe={}, gate=gate,
        models=(model("original", 1000, 10), model("baseline", 300, 11), product),
    )  # fmt: skip


def sweep(*members: Results | str) -> SweepResults:
    given = [
        MemberResults(
            f"x-m{index}",
            f"m{index}",
            {"prune.ratio": index / 10},
            None if isinstance(member, str) else member,
            member if isinstance(member, str) else None,
        )
        for index, member in enumerate(members)
    ]
    return collect_sweep("x", ("prune.ratio",), given)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 9), (2, 5), (3, 6)], [True, True, False]),
        ([(1, 9), (1, 8)], [False, True]),
        ([(1, 9), (2, 9)], [True, False]),
        ([(1, 9), (1, 9)], [True, True]),
        ([(1, float("nan")), (2, 5)], [False, True]),
        ([], []),
    ],
)
def test_the_front_is_what_no_other_beats(points: list[tuple[float, float]], expected: list[bool]) -> None:
    assert front(points) == expected


def test_a_member_that_the_unpruned_baseline_beats_is_not_on_the_front() -> None:
    results = sweep(found(200, 12), found(290, 11.5), found(310, 11.5))
    assert [bool(row.on_front) for row in results.rows] == [True, True, False]
    assert results.references_on_front == {"held-out": ("original", "baseline")}
    assert summary(results) == (
        "3 members over prune.ratio; on the Pareto front of size and perplexity: m0, m1."
    )


def test_the_best_is_the_smallest_that_passes_the_gate() -> None:
    results = sweep(found(250, 11, 0.3), found(200, 12, 0.3), found(100, 14, 0.3))
    best = best_member(results)
    assert best is not None
    assert best.name == "x-m1"
    assert best_member(sweep(found(200, 12))) is None, "nothing was required, so nothing was passed"
    assert best_member(sweep(found(200, 20, 0.3), "broken")) is None


def test_a_member_that_failed_is_a_row_with_its_reason(tmp_path: Path) -> None:
    results = sweep(found(200, 12), "calibration is too short")
    write_sweep(results, tmp_path)
    html = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "x-m1: calibration is too short" in html
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows["x-m1"]["failure"] == "calibration is too short"
    assert rows["x-m1"]["bytes"] == ""
    assert float(rows["x-m0"]["perplexity.held-out"]) == 12
    assert rows["x-m0"]["front.held-out"] == "True"
    assert rows["original"]["bytes"] == "1000"
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"][1]["failure"]
    assert read_sweep(tmp_path / "sweep.json") == results


def test_a_sweep_of_nothing_but_failures_is_a_page_too() -> None:
    page = Page(render_sweep(sweep("one", "two")))
    assert page.open == []
    assert "nothing to draw" in " ".join(page.words)


def test_the_page_needs_nothing_beside_it_and_closes_every_element() -> None:
    html = render_sweep(sweep(found(200, 12), found(100, 20, 0.3), "broken"))
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset"} & attributes.keys(), tag
    assert not re.search(r"url\(|@import|https?://", html)


def test_a_hostile_name_is_text() -> None:
    results = found(200, 12)
    evil = {HOSTILE: SCORE}
    rows = tuple(row.model_copy(update={"title": HOSTILE, "perplexity": evil}) for row in results.models)
    given = MemberResults(
        HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, results.model_copy(update={"models": rows}), HOSTILE
    )
    html = render_sweep(collect_sweep(HOSTILE, (HOSTILE,), [given]))
    assert [tag for tag, _ in Page(html).elements].count("script") == 1, "the one that sorts"
    assert HOSTILE in "".join(Page(html).words)


def test_every_cell_of_the_table_can_be_sorted_by_its_number() -> None:
    page = Page(render_sweep(sweep(found(200, 12), found(100, 20))))
    keys = [
        attributes["data-key"]
        for tag, attributes in page.elements
        if tag == "td" and "data-key" in attributes
    ]
    assert {"1000", "300", "200", "100", "12", "20", "0.1"} <= set(keys)


def test_the_drawing_marks_the_front_and_the_failed_and_names_who_is_far_away() -> None:
    html = render_sweep(sweep(found(200, 12), found(100, 20, 0.3), found(250, 14)))
    drawing = re.search(r"<svg.*?</svg>", html, re.DOTALL)
    assert drawing is not None
    drawn = drawing[0]
    circles = re.findall(r"<circle.*?</circle>", drawn)
    assert [("accent" in circle, "hollow" in circle) for circle in circles] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    assert drawn.count("<rect") == 1, "the baseline"
    assert "original: 10.00 at 1 kB" in drawn
    assert 'class="front"' in drawn


def test_terminal_and_markdown_say_the_same() -> None:
    results = sweep(found(200, 12, 0.3), "broken")
    console = Console(width=120, record=True, file=StringIO())
    console.print(sweep_table(results))
    told = console.export_text()
    assert "x-m1: broken" in told
    for words in ("12.00 (+20.0 %)", "original", "passed"):
        assert words in told
        assert words in sweep_markdown(results)


def test_the_mean_over_tasks_has_a_column_where_tasks_were_measured() -> None:
    results = found(200, 12)
    average = {"acc": Accuracy(value=0.6, standard_error=0.01)}
    rows = (*results.models[:2], results.models[2].model_copy(update={"task_average": average}))
    with_tasks = sweep(results.model_copy(update={"models": rows}), "broken")
    head, *lines = csv_rows(with_tasks)
    assert [line[head.index("task_average")] for line in lines] == [None, None, 0.6, None]
    assert {len(line) for line in lines} == {len(head)}
    assert "| tasks |" in sweep_markdown(with_tasks).replace("---:", "")
    assert "60" in sweep_markdown(with_tasks)
    assert "tasks" not in sweep_markdown(sweep(results))
