"""The report as a page and as files."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from camera.report.gate import Gate, Requirement
from camera.report.html import flat_rows, render_html, write_report
from camera.report.lineage import lineage_grid
from camera.report.table import grids
from camera.report.words import perplexity_words
from tests.camera.report.conftest import TEXT, Run

HOSTILE = "<script>alert('&\"')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}
LINEAGE = {
    "schema": 1,
    "sources": {"a" * 64: {"name": "model", "digest": "a" * 64, "path": "/somewhere/secret/tiny"}},
    "stages": {
        "c" * 64: {
            "step": "a later step",
            "key": "c" * 64,
            "digest": "d" * 64,
            "inputs": {"statistics": {"digest": "f" * 64, "stage": "capture", "key": "e" * 64}},
        },
        "e" * 64: {
            "step": "capture",
            "key": "e" * 64,
            "digest": "f" * 64,
            "inputs": {"model": {"digest": "a" * 64, "stage": None, "key": None}},
            "environment": {"commit": "0123456789abcdef+", "packages": {"torch": "2.13.0"}},
        },
    },
}


class Page(HTMLParser):
    """Elements with their attributes, and whether every one is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_beside_it(run: Run) -> None:
    html = render_html(run.results(), LINEAGE)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys(), tag
    assert not re.search(r"url\(|@import|https?://", html)


def test_every_element_is_closed(run: Run) -> None:
    assert Page(render_html(run.results(), LINEAGE)).open == []


def test_a_hostile_name_is_text(run: Run) -> None:
    results = run.results(name=HOSTILE)
    row = results.models[3].model_copy(
        update={"title": HOSTILE, "perplexity": {HOSTILE: results.models[3].perplexity[TEXT]}}
    )
    hostile = results.model_copy(
        update={"models": (*results.models[:3], row), "base_model": HOSTILE, "recipe": {"x": HOSTILE}}
    )
    lineage = {"sources": {}, "stages": {"k": {"step": HOSTILE, "digest": HOSTILE}}}
    page = Page(render_html(hostile, lineage))
    assert "script" not in {tag for tag, _ in page.elements}
    assert "".join(page.words).count(HOSTILE) >= 4


def test_the_page_shows_every_cell_of_every_table(run: Run) -> None:
    results = run.results()
    page = Page(render_html(results))
    shown = {word.strip() for word in page.words}
    for grid in grids(results):
        for row in grid.rows:
            assert set(row) <= shown


def test_the_page_draws_every_figure(run: Run) -> None:
    results = run.results()
    html = render_html(results)
    labels = {attributes["aria-label"] for tag, attributes in Page(html).elements if tag == "svg"}
    bars = re.findall(r"<figure>\n<h3>(.*)</h3>\n.*\n<div class=\"bars\">", html)
    assert bars == [
        f"Perplexity on {TEXT}",
        "torch: prefill of 4 tokens",
        "torch: decode of 4 tokens",
        "torch: decode of 8 tokens",
    ]
    assert labels == {
        f"Perplexity on {TEXT} against size",
        "Importance of micro-experts by layer",
        "Importance by layer and rank",
        "Share of importance kept, by layer",
        "Channels kept, by layer",
    }


def test_no_coordinate_is_beyond_a_number(run: Run) -> None:
    values = [
        value
        for _, attributes in Page(render_html(run.results())).elements
        for value in attributes.values()
        if value
    ]
    assert not [value for value in values if re.search(r"\b(nan|inf|None)\b", value)]


def test_channels_that_never_fire_do_not_stop_the_log_scale(run: Run) -> None:
    results = run.results()
    dead = results.importance[0].model_copy(update={"curve": (1.0, 0.0, 0.0)})
    nothing = results.importance[1].model_copy(update={"curve": (0.0, 0.0)})
    for layers in ((dead, nothing), (nothing,)):
        html = render_html(results.model_copy(update={"importance": layers}))
        assert "Importance of micro-experts by layer" in html
        assert "nan" not in html


def test_equal_artifacts_give_equal_files(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(run.results(), tmp_path / name, LINEAGE)
    names = ("report.html", "results.json", "results.csv")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("benchmark", "Speed was not measured"),
        ("evaluate", "Perplexity was not measured"),
        ("pruned", "no prune summary"),
        ("scores", "no importance scores"),
        ("quantized", "Nothing was quantised"),
    ],
)
def test_what_did_not_run_is_said(run: Run, part: str, words: str) -> None:
    assert words not in render_html(run.results())
    assert words in render_html(run.results(without=(part,)))


def test_a_run_of_nothing_is_a_page_too(run: Run) -> None:
    page = Page(render_html(run.results(without=tuple(run.folders))))
    assert page.open == []
    assert "No lineage was given with these results." in page.words


def test_noisy_rows_are_flagged(run: Run) -> None:
    results = run.results()
    rows = [row.model_copy(update={"noisy": index == 0}) for index, row in enumerate(results.benchmark)]
    html = render_html(results.model_copy(update={"benchmark": tuple(rows)}))
    assert f"{rows[0].model} on torch: decode 4</li>" in html


def test_lineage_lists_every_stage_after_what_it_reads() -> None:
    rows = lineage_grid(LINEAGE).rows
    assert [row[0] for row in rows] == ["model: tiny", "capture", "a later step"]
    assert [row[1] for row in rows] == ["source", "e" * 12, "c" * 12]
    assert [row[3] for row in rows] == ["–", "model: tiny", "capture"]


def test_lineage_in_a_circle_is_listed_and_not_waited_for() -> None:
    circle = {key: {"step": key, "inputs": {"x": {"key": other}}} for key, other in (("a", "b"), ("b", "a"))}
    assert [row[0] for row in lineage_grid({"stages": circle}).rows] == ["a", "b"]


def test_the_page_shows_short_digests_and_no_folder_of_the_machine(run: Run) -> None:
    html = render_html(run.results(), LINEAGE)
    assert "commit 0123456789ab+" in html
    assert "f" * 12 in html
    assert "f" * 13 not in html
    assert "secret" not in html


def test_the_csv_has_a_line_for_every_number(run: Run, tmp_path: Path) -> None:
    results = run.results()
    write_report(results, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(flat_rows(results)))
    found = {(row["model"], row["quantity"], row["of"]): row["value"] for row in rows}
    product = results.product
    assert product is not None
    assert float(found[product.title, "perplexity", TEXT]) == product.perplexity[TEXT].value
    assert int(found["original", "parameters", ""]) == results.models[0].parameters
    assert float(found["unpruned, q4_0", "decode_speedup", "torch prompt=4 decode=8"]) == 1


def test_perplexity_beyond_reason_is_still_drawn(run: Run) -> None:
    results = run.results()
    row = results.models[3]
    broken = row.model_copy(
        update={"perplexity": {TEXT: row.perplexity[TEXT].model_copy(update={"value": 1e30})}}
    )
    html = render_html(results.model_copy(update={"models": (*results.models[:3], broken)}))
    assert perplexity_words(1e30) in html


def test_a_failed_gate_is_a_banner_at_the_head_and_a_passed_one_is_told_with_quality(run: Run) -> None:
    results = run.results()
    requirement = Requirement(name="perplexity_increase", of=TEXT, limit=0.1, found=0.5)
    failed = render_html(results.model_copy(update={"gate": Gate(requirements=(requirement,))}))
    assert failed.index("fails the quality gate") < failed.index("<h2>Results</h2>")
    assert "".join(Page(failed).words).count(requirement.words) == 1
    met = requirement.model_copy(update={"limit": 0.6})
    passed = "".join(Page(render_html(results.model_copy(update={"gate": Gate(requirements=(met,))}))).words)
    assert "fails the quality gate" not in passed
    assert met.words in passed
    assert "gate" not in render_html(results)
