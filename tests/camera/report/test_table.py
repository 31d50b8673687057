"""The results table in a terminal and in Markdown."""

import pytest
from rich.console import Console

from camera.report.schema import Results
from camera.report.table import quality_grid, results_markdown, results_table, speed_grid
from camera.report.words import (
    change_words,
    count_words,
    milliseconds,
    percent,
    perplexity_words,
    speed_words,
    verdict,
)
from camera.units import bytes_text
from tests.camera.report.conftest import TEXT, Run


def _terminal(results: Results) -> list[str]:
    console = Console(width=100, force_terminal=False, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(results_table(results))
    return captured.get().splitlines()


def test_the_terminal_table_keeps_every_row_on_one_line_of_100_columns(run: Run) -> None:
    results = run.results()
    lines = _terminal(results)
    assert max(map(len, lines)) <= 100
    for row in results.models:
        assert any(
            line.lstrip().startswith(row.title) and perplexity_words(row.perplexity[TEXT].value) in line
            for line in lines
        ), row.title


def test_both_tables_show_speed_with_its_ratio(run: Run) -> None:
    results = run.results()
    text, markdown = "\n".join(_terminal(results)), results_markdown(results)
    for row in results.benchmark:
        assert row.decode_ms is not None
        shown = f"{milliseconds(row.decode_ms.median)} ({row.decode_speedup:.2f}×)"
        assert shown in text
        assert shown in markdown


def test_a_row_that_failed_shows_a_dash_and_the_reason(run: Run) -> None:
    results = run.results()
    lost = results.benchmark[0].model_copy(
        update={"failure": "no such engine", "decode_ms": None, "decode_speedup": None}
    )
    grid = speed_grid(results.model_copy(update={"benchmark": (lost, *results.benchmark[1:])}))
    assert grid is not None
    assert grid.rows[0][3] == "–"
    assert any("no such engine" in note for note in grid.notes)


def test_noisy_rows_are_marked_and_explained(run: Run) -> None:
    results = run.results()
    noisy = results.benchmark[0].model_copy(update={"noisy": True})
    quiet = [row.model_copy(update={"noisy": False}) for row in results.benchmark[1:]]
    grid = speed_grid(results.model_copy(update={"benchmark": (noisy, *quiet)}))
    assert grid is not None
    assert [cell.endswith("*") for row in grid.rows for cell in row].count(True) == 1
    assert any(note.startswith("*") for note in grid.notes)


def test_what_was_timed_in_a_models_place_is_said(run: Run) -> None:
    results = run.results()
    twin = results.benchmark[0].model_copy(update={"stand_in": "its Q4_0 twin"})
    grid = speed_grid(results.model_copy(update={"benchmark": (twin, *results.benchmark[1:])}))
    assert grid is not None
    assert [note for note in grid.notes if "its Q4_0 twin" in note] == [
        f"{twin.model} on {twin.engine}: timed as its Q4_0 twin"
    ]


def test_without_a_benchmark_there_is_no_speed_table_and_the_other_says_so(run: Run) -> None:
    results = run.results(without=("benchmark",))
    assert speed_grid(results) is None
    assert any("benchmark" in note for note in quality_grid(results).notes)
    assert "speed not measured" in verdict(results)


def test_markdown_cells_cannot_break_the_table(run: Run) -> None:
    results = run.results()
    row = results.models[0].model_copy(update={"title": "a|b\n<script>"})
    markdown = results_markdown(results.model_copy(update={"models": (row,)}))
    assert "| a\\|b \\<script\\> |" in markdown


def test_terminal_markup_in_a_name_is_shown_and_not_obeyed(run: Run) -> None:
    assert "[red]tiny[/red]" in "\n".join(_terminal(run.results(name="[red]tiny[/red]")))


def test_the_verdict_says_what_was_removed_what_it_cost_and_what_it_gained(run: Run) -> None:
    results = run.results()
    product = results.product
    assert product is not None
    change = product.perplexity[TEXT].change
    assert change is not None
    said = verdict(results)
    assert said.startswith("25.0 % of the FFN channels removed (192 → 144 per layer)")
    assert f"perplexity {change_words(change)} on {TEXT}" in said
    assert "× as fast as unpruned, q4_0 (torch, 8 tokens" in said


def test_zeroed_channels_are_not_called_removed(run: Run) -> None:
    results = run.results()
    assert results.prune is not None
    masked = results.model_copy(update={"prune": results.prune.model_copy(update={"mode": "mask"})})
    assert "25.0 % of the FFN channels set to zero" in verdict(masked)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (bytes_text(999), "999 B"),
        (bytes_text(4_860_000_000), "4.86 GB"),
        (count_words(8_030_887_936), "8.031 B"),
        (count_words(0), "0"),
        (percent(0.2), "20.0 %"),
        (change_words(0.0512), "+5.1 %"),
        (change_words(-0.031), "−3.1 %"),
        (change_words(-0.0001), "±0.0 %"),
        (perplexity_words(1e6), "1e+06"),
        (milliseconds(0.4567), "0.457"),
        (milliseconds(1234.5), "1234"),
        (speed_words(None, None), "–"),
    ],
)
def test_numbers_are_short(words: str, expected: str) -> None:
    assert words == expected


def test_the_model_that_the_run_was_for_is_set_off(run: Run) -> None:
    grid = quality_grid(run.results())
    assert [grid.rows[index][0] for index in grid.strong] == ["pruned, q4_0_64"]
