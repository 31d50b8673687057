"""The rooms import one way, no module waits for itself, and no two sub-packages of camera know each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FORBIDDEN = {
    "camera": {"prefect", "mlflow", "dvc", "tasks", "flows"},
    "tasks": {"flows"},
}


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path, room: str) -> dict[str, ast.Module]:
    """Every module of a room, parsed, by its dotted name."""
    return {
        module_name(root, path): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted((root / room).rglob("*.py"))
    }


def imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Dotted names that import statements ask for, `from a import b` as `a.b`, with the line."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def run_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: not the bodies of functions, nor of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def wrong_ways(root: Path, room: str) -> list[str]:
    """Imports, anywhere in a room, of what the room must not know."""
    return [
        f"{name}:{line} imports {asked}"
        for name, tree in modules(root, room).items()
        for asked, line in imported(ast.walk(tree))
        if asked.split(".")[0] in FORBIDDEN[room]
    ]


def import_graph(root: Path, room: str) -> dict[str, set[str]]:
    """Which modules of a room each one imports as it is imported."""
    trees = modules(root, room)
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        graph[name] = set()
        for asked, _ in imported(run_on_import(tree)):
            target = asked if asked in trees else asked.rpartition(".")[0]
            if target in trees:
                graph[name].add(target)
    return graph


def package_graph(root: Path) -> dict[str, set[str]]:
    """Which sub-packages and top-level modules of camera each one imports, inside functions and for types too.

    An import whose line says `# cycle allowed: why` does not count.
    """
    graph: dict[str, set[str]] = {}
    for name, tree in modules(root, "camera").items():
        if name == "camera":  # the door to all of them
            continue
        package = name.split(".")[1]
        path = root.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        lines = file.read_text(encoding="utf-8").splitlines()
        for asked, line in imported(ast.walk(tree)):
            room, _, rest = asked.partition(".")
            other = rest.split(".")[0]
            if room == "camera" and other != package and "# cycle allowed: " not in lines[line - 1]:
                graph.setdefault(package, set()).add(other)
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Every group of nodes that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        waiting, reached[start] = [start], set()
        while waiting:
            new = graph.get(waiting.pop(), set()) - reached[start]
            reached[start] |= new
            waiting += new
    return {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in graph
        if node in reached[node]
    }


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_from_the_rooms_above(room: str) -> None:
    assert modules(REPOSITORY, room)
    assert wrong_ways(REPOSITORY, room) == []


@pytest.mark.parametrize("room", ["camera", "tasks", "flows"])
def test_no_module_of_a_room_imports_itself_through_others(room: str) -> None:
    graph = import_graph(REPOSITORY, room)
    assert graph
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_no_sub_packages_of_camera_import_each_other_in_a_circle() -> None:
    graph = package_graph(REPOSITORY)
    assert len(graph) > 10
    assert circles(graph) == set()


def test_a_circle_of_sub_packages_is_found_though_a_function_hides_it(tmp_path: Path) -> None:
    for name in ("left", "right", "top"):
        (tmp_path / "camera" / name).mkdir(parents=True)
    (tmp_path / "camera" / "left" / "a.py").write_text("from camera.right import b\n")
    (tmp_path / "camera" / "right" / "b.py").write_text("def late():\n    from camera.left.c import x\n")
    (tmp_path / "camera" / "top" / "d.py").write_text("import camera.left.a\nimport camera.top.e\n")
    assert circles(package_graph(tmp_path)) == {frozenset({"left", "right"})}
    (tmp_path / "camera" / "right" / "b.py").write_text("import camera.left.c  # cycle allowed: a test\n")
    assert circles(package_graph(tmp_path)) == set()


def test_the_graph_knows_who_imports_whom() -> None:
    graph = import_graph(REPOSITORY, "camera")
    assert "camera.pruning.execute" in graph["camera.pruning.stages"]
    assert "camera.models" in graph["camera.checkpoints.checkpoint"]
    assert "camera.models.family" in graph["camera.models"]
    assert "camera.models.pangu.modeling" not in graph["camera.models.pangu"]  # only inside a function


@pytest.mark.parametrize(
    "text",
    [
        "import prefect",
        "import mlflow.pyfunc as m",
        "from dvc.repo import Repo",
        "from tasks import capture",
        "def late():\n    from flows.cli import main",
        "try:\n    import prefect\nexcept ImportError:\n    pass",
    ],
)
def test_a_wrong_import_is_found_wherever_it_hides(tmp_path: Path, text: str) -> None:
    (tmp_path / "camera" / "deep").mkdir(parents=True)
    (tmp_path / "camera" / "good.py").write_text("import torch\nfrom camera.deep import bad\n")
    assert wrong_ways(tmp_path, "camera") == []
    (tmp_path / "camera" / "deep" / "bad.py").write_text(text)
    assert [found.split(":")[0] for found in wrong_ways(tmp_path, "camera")] == ["camera.deep.bad"]


def test_a_cycle_is_found_and_one_broken_inside_a_function_is_none(tmp_path: Path) -> None:
    (tmp_path / "camera").mkdir()
    (tmp_path / "camera" / "a.py").write_text("from camera.b import x\n")
    (tmp_path / "camera" / "b.py").write_text("if True:\n    from camera import a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path, "camera")).prepare()
    (tmp_path / "camera" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from camera import a\n"
        "def late():\n    from camera import a\n"
    )
    TopologicalSorter(import_graph(tmp_path, "camera")).prepare()


def test_opening_a_checkpoint_does_not_wait_for_transformers() -> None:
    code = (
        "import sys\n"
        "import camera.options, camera.models, camera.checkpoints.checkpoint\n"
        "heavy = {'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
