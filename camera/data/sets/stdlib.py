"""The built-in data set: the doc strings of the standard library of the Python that runs this.

It needs no network and no download. Source files are parsed, never imported.
"""

import ast
import gc
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from camera.data.sets import DATA_SETS, DataSet, Documents
from camera.options import DatasetOptions

TEST_SHARE = 0.15
"""Share of the source files whose doc strings are held out."""
_SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "ensurepip",
    ]
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Stdlib(DataSet):
    """The doc strings of the running Python; another version is another text."""

    def read(self, options: DatasetOptions) -> Documents:
        return read(options.split)

    def identity(self, options: DatasetOptions) -> dict[str, Any]:
        return {"python": platform.python_version()}


def read(split: Literal["train", "test"]) -> Documents:
    """The doc strings of one part, cleaned of indentation, in the order of files and lines.

    The parts are split by source file. A text is kept once, where it first occurs, and `train` comes first:
    no text of `test` occurs in `train`.
    """
    return Documents(
        [text for text, part in _texts().items() if part == split],
        joiner="\n\n",
        source=f"doc strings of the standard library of Python {platform.python_version()}, {split} part",
    )


@cache  # parsing 600 files takes seconds, and both parts need all of them
def _texts() -> dict[str, str]:
    """Every text with its part, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {path: path.relative_to(root).as_posix() for path in source_files(root)}
    found: dict[str, str] = {}
    with _paused_garbage_collection():
        for part in ("train", "test"):
            for path, name in names.items():
                if part_of(name) == part:
                    found.update((text, part) for text in docstrings(path) if text not in found)
    return found


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """A syntax tree is millions of small objects and no cycles: the collector would take two thirds of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
    for node in _documented(tree):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if text:
            yield text


def _documented(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """What may have a doc string, by line. Only statements hold statements, so expressions are not walked."""
    if isinstance(node, _DOCUMENTED):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child)


DATA_SETS.register("stdlib", Stdlib())
