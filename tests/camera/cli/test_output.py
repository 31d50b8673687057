"""What commands print, of names that files of strangers could have."""

import json

import pytest
from rich.table import Table
from rich.text import Text

from camera.cli.output import make_console, note, print_json, print_table, say
from camera.escape import one_line
from tests.hostile import NAMES

PRINTABLE = [name for name in NAMES if len(name) < 1000]


@pytest.mark.parametrize("name", PRINTABLE)
def test_a_name_is_one_line_and_plain_text_in_every_outlet(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "500")
    say(f"model: {name}")
    note(f"model: {name}")
    print_table(("a", name), [(name, "b"), ("c", Text(one_line(name)))], title=name)
    table = Table(name)
    table.add_row(name)
    make_console().print(table)
    make_console(stderr=True).print(name, Text(name))
    told = capsys.readouterr()
    for line in (told.out + told.err).split("\n"):
        assert line == one_line(line), ascii(line)
    assert told.out.count(one_line(name)) >= 4
    assert told.err.startswith("model: ")


def test_a_line_of_a_name_cannot_be_taken_for_a_line_of_the_answer(capsys: pytest.CaptureFixture[str]):
    say("no file x\n✓ verified")
    note("no file x\n✓ verified")
    told = capsys.readouterr()
    assert told.out == told.err == "no file x\n  | ✓ verified\n"


@pytest.mark.parametrize("name", PRINTABLE)
def test_a_document_for_scripts_means_what_it_meant_and_steers_no_terminal(
    name: str, capsys: pytest.CaptureFixture[str]
):
    print_json({"name": name})
    told = capsys.readouterr().out
    same = {
        "name": name
    }  # but for a pair of surrogates, of which JSON makes the character that they stand for
    assert json.loads(told) == json.loads(json.dumps(same))
    assert all(line == one_line(line) for line in told.split("\n"))
    assert told.encode()


def test_brackets_and_codes_in_a_name_are_no_markup_and_no_emoji(capsys: pytest.CaptureFixture[str]):
    make_console().print("runs [v2]/lab[/x] :smile: [link=http://evil.example]x[/link]")
    assert capsys.readouterr().out.strip() == "runs [v2]/lab[/x] :smile: [link=http://evil.example]x[/link]"
