"""What a reader may count on in any function of the library."""

import ast

from tests.camera.test_imports import modules
from tests.conftest import REPOSITORY

MOST = 7
"""Parameters, without `self`: who needs more passes an options model or a dataclass."""


def test_no_function_of_the_library_takes_more_than_seven_parameters() -> None:
    found = set()
    for module, tree in modules(REPOSITORY, "camera").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > MOST:
                    found.add(f"{module}.{node.name}")
    assert found == set()
