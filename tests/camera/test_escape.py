"""Text from files: what it is made of for a terminal, Markdown, HTML and JSON."""

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camera.escape import json_text, lines, lines_of_one, markdown, one_line

SPELT_WITH_FORMATS = "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
"""Joiners, and signs that enclose numbers: they are letters to those who write with them."""
HONEST = [
    "published/tiny q4_0.gguf", "runs [v2]/lab[/x]", "模型/权重", "résumé", "می‌خواهم", "👩‍👩‍👧", "a|b`c`<d>", r"C:\temp",
    "été 50 %", "½ ± 3σ…", "𝕏",
]  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_name_is_left_as_it_is(name: str):
    assert one_line(name) == lines(name) == name


def test_what_steers_breaks_turns_or_hides_becomes_visible_whatever_it_is():
    for code in range(sys.maxunicode + 1):
        sign = chr(code)
        kind = unicodedata.category(sign)
        if kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(sign) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        ):
            assert sign not in one_line(sign), hex(code)
            assert one_line(sign).isascii(), hex(code)


def test_the_escapes_name_the_character():
    assert one_line("a\x1b[2Jb\nc\td\re\u202ef\u2028g\x9bh\udcffi\U000e0041") == (
        r"a\x1b[2Jb\nc\td\re\u202ef\u2028g\x9bh\udcffi\U000e0041"
    )


def test_lines_keep_their_breaks_and_those_of_one_message_are_told_from_answers_of_their_own():
    assert lines("a\nb\x1b") == "a\nb\\x1b"
    assert lines_of_one("camera: no file a\n✓ all verified") == "camera: no file a\n  | ✓ all verified"


@given(st.text())
def test_every_text_becomes_one_line_that_can_be_written_and_stays_so(text: str):
    made = one_line(text)
    assert len(made.splitlines()) <= 1
    assert made.encode() is not None
    assert one_line(made) == made


@given(st.text(max_size=40))
def test_json_means_the_same_with_escapes_for_what_cannot_be_seen(text: str):
    document = json_text(json.dumps({text: [text]}, ensure_ascii=False))
    assert json.loads(document) == {text: [text]}
    assert one_line(document) == document


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("x <img src=x> | y", r"x \<img src=x\> \| y"),
        ("# heading\n\n* item", r"\# heading \* item"),
        ("[a](https://b.example)", r"\[a\](https\://b.example)"),
        ("https://b.example www.b.example @you", r"https\://b.example www\.b.example \@you"),
        ("&lt;b&gt; $x$ ~y~", r"\&lt;b\&gt; \$x\$ \~y\~"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("---", r"\---"),
        ("−1.3 and -1.3, 1.83 (2.0×)", "−1.3 and -1.3, 1.83 (2.0×)"),
        ("a\x1bb", r"a\\x1bb"),
    ],
)
def test_markdown_leaves_text_as_it_is(text: str, written: str):
    assert markdown(text) == written
