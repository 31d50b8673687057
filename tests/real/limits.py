"""The table of what every command took: printed at the end of the suite, and written into docs/limits.md."""

from collections.abc import Iterable

from tests.conftest import REPOSITORY
from tests.real.commands import COMMANDS, MANY, TEXT, TOKENS
from tests.real.workshop import Done

PAGE = REPOSITORY / "docs" / "limits.md"
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"
_HEADINGS = ("stage", "time", "CPU time", "peak", "bound", "command")


def rows_of(done: Iterable[Done]) -> list[tuple[str, ...]]:
    """A row for each command that ended well; a peak above its bound is marked."""
    return [
        (
            one.name,
            f"{one.seconds:.0f} s",
            f"{one.cpu_seconds:.0f} s",
            f"{one.peak_bytes / 1e9:.2f} GB" + (" **over**" if one.peak_bytes > one.bound_bytes else ""),
            f"{one.bound_bytes / 1e9:.2f} GB",
            "`" + one.command.replace(TOKENS, "TOKENS").replace(MANY, "MANY").replace(TEXT, "TEXT") + "`",
        )
        for one in done
        if one.code == 0
    ]


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """In Markdown, which a terminal shows well enough."""
    rule = ("---", "---:", "---:", "---:", "---:", "---")
    return "\n".join("| " + " | ".join(row) + " |" for row in (_HEADINGS, rule, *rows)) + "\n"


def write_limits(rows: Iterable[tuple[str, ...]]) -> None:
    """Put rows into the table in docs/limits.md, in the order of the commands; others of it stay."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    old, _, after = rest.partition(_END)
    known = (tuple(line.strip("| ").split(" | ")) for line in old.splitlines()[2:])
    merged = {row[0]: row for row in (*known, *rows)}
    ordered = [merged[name] for name in COMMANDS if name in merged]
    PAGE.write_text(before + _BEGIN + table(ordered) + _END + after, encoding="utf-8")
