"""Text from files, made harmless for where it is shown: a terminal, a log, Markdown, HTML, JSON.

A name that comes from a file may hold anything: line breaks and "✓ verified", sequences that clear a screen, marks that turn
the order of letters, halves of characters that no encoding can write. Whoever shows one passes it through `one_line`.
"""

import re
from typing import Any

_INVISIBLE = (
    "\x00-\x09\x0b-\x1f\x7f-\x9f"  # control characters, CSI and OSC of eight bits among them; the line feed apart
    "\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\U0001d173-\U0001d17a\U000e0000-\U000e007f"
    "\ud800-\udfff"  # surrogates: what os.fsdecode makes of bytes that are no UTF-8
)
"""Control characters, what separates lines, what turns the order of letters or cannot be seen, and lone surrogates. The joiners
U+200C and U+200D are not among them: names in Persian and family emoji are spelt with them."""
_LINES = re.compile(f"[{_INVISIBLE}]")
_LINE = re.compile(f"[\n{_INVISIBLE}]")
_MARKUP = re.compile(r"[\\`*_|<>\[\]#~&$@]|(?<=www)\.|:(?=//)")
"""What begins something in Markdown inside a line: also GitHub's links without brackets, mentions and formulas."""
_BLOCK = re.compile(r"^(?:[-+](?=\s|$)|[-=][-=\s]*$|\d{1,9}(?=[.)](?:\s|$)))")
"""What makes a list, a line or a heading of the text that it begins."""


def one_line(text: Any) -> str:
    r"""A name as it may stand in a line of ours: what breaks lines, steers a terminal or hides is shown as `\x1b`, `\u202e`.

    Nothing else changes, so that a path with spaces, brackets or Chinese characters can be copied from a message.
    """
    return _LINE.sub(_visible, str(text))


def lines(text: Any) -> str:
    """The same for a text of many lines, which keeps its line feeds: an error's, a log's, what a model wrote."""
    return _LINES.sub(_visible, str(text))


def lines_of_one(text: Any) -> str:
    """A message of many lines, such that its later lines cannot be taken for answers of their own."""
    return lines(text).replace("\n", "\n  | ")


def markdown(text: Any) -> str:
    """Text that Markdown, its HTML and its tables leave as it is, on one line."""
    escaped = _MARKUP.sub(r"\\\g<0>", " ".join(one_line(str(text).replace("\n", " ")).split()))
    found = _BLOCK.match(escaped)
    if found is None:
        return escaped
    end = found.end() if found[0][0].isdigit() else 0
    return f"{escaped[:end]}\\{escaped[end:]}"


def json_text(document: str) -> str:
    """A JSON document that a terminal may be sent: what cannot be seen stands as JSON's own escapes, and means the same."""
    return _LINES.sub(_in_json, document)


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in "\t\n\r":
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}[found[0]]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _in_json(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
