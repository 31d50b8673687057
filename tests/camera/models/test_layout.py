"""How a family's tensors are called, nobody but the family's file says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LAYOUT = re.compile(
    r"\bmlp\b(?!_)|gate_proj|up_proj|down_proj|self_attn|model\.layers|intermediate_size|lm_head|embed_tokens|model\.norm\b"
)
FAMILIES = REPOSITORY / "camera" / "models"


def literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Strings that are no docstrings, and names of attributes and keywords, with their lines."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg


def named(folder: Path) -> list[str]:
    """Where a folder's modules name a part of a layout; an example in a message does not count."""
    return [
        f"{path.relative_to(REPOSITORY)}:{line}: {text}"
        for path in sorted(folder.rglob("*.py"))
        if not path.is_relative_to(FAMILIES)
        for line, text in literals(ast.parse(path.read_text(encoding="utf-8")))
        if LAYOUT.search(text) and "for example" not in text
    ]


@pytest.mark.parametrize("room", ["camera", "tasks", "flows"])
def test_no_part_of_a_layout_is_named_outside_the_families(room: str) -> None:
    assert named(REPOSITORY / room) == []


def test_the_search_finds_names_in_strings_and_attributes_and_not_in_documentation(tmp_path: Path) -> None:
    tree = ast.parse('"""mlp"""\nlayer.mlp\nname = f"{prefix}self_attn.q"\nconfig(intermediate_size=3)\n')
    assert [line for line, text in literals(tree) if LAYOUT.search(text)] == [2, 3, 4]
