"""The built-in dataset: the doc strings of the standard library of the Python that runs this.

It needs no network and no download. Source files are parsed, never imported.
"""

import ast
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from camera.data.documents import Documents

TEST_SHARE = 0.15
"""Share of the source files whose doc strings are held out."""
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "ensurepip",
    }
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read(split: Literal["train", "test"]) -> Documents:
    """The doc strings of one part, cleaned of indentation, in the order of files and lines.

    The parts are split by source file. A text is kept once, where it first occurs, and `train` comes first:
    no text of `test` occurs in `train`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: dict[str, str] = {}
    for part in ("train", "test"):
        for file in source_files(root):
            if part_of(file.relative_to(root).as_posix()) == part:
                for text in docstrings(file):
                    seen.setdefault(text, part)
    texts = [text for text, part in seen.items() if part == split]
    return Documents(
        texts,
        joiner="\n\n",
        source=f"doc strings of the standard library of Python {platform.python_version()}, {split} part",
    )


def source_files(root: Path) -> list[Path]:
    """The library's own source files below `root`, sorted by relative name; no tests, nothing installed."""
    return sorted(
        (
            path
            for path in root.rglob("*.py")
            if path.is_file() and not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        ),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def part_of(name: str) -> Literal["train", "test"]:
    """The part a source file belongs to: a function of its relative name alone."""
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "test" if value < TEST_SHARE * 2**64 else "train"


def docstrings(file: Path) -> Iterator[str]:
    """The doc strings of a module, its classes and functions, by line; nothing from a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own sources
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if text:
            yield text
