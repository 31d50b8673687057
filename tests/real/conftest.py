"""The workshop of the suite, and the table at its end."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real.checkpoint import write_model
from tests.real.limits import rows_of, table, write_limits
from tests.real.workshop import Done, Workshop

_ORDER = ("test_prune", "test_quantize", "test_evaluate", "test_bench", "test_pipeline", "test_bounds")
"""Of the modules: what one makes the next ones read."""
_WORKSHOP = pytest.StashKey[Workshop]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules of this suite come last, in the order in which one needs another."""
    place = {name: number for number, name in enumerate(_ORDER)}
    here = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.stem, -1) if item.path.parent == here else -1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What every command took, as a table; and in docs/limits.md where that was asked for."""
    workshop = config.stash.get(_WORKSHOP, None)
    if workshop is not None and workshop.done:
        rows = rows_of(workshop.done.values())
        terminalreporter.write_line(table(rows))
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        terminalreporter.write_line(f"The plain computations took up to {own / 1e9:.1f} GB themselves.")
        if os.environ.get("CAMERA_REAL_WRITE"):
            write_limits(rows)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Workshop]:
    """A temporary folder with the checkpoint; where CAMERA_REAL_MODEL names a folder, it stays there for the next time."""
    folder = tmp_path_factory.mktemp("real")
    model = Path(os.environ.get("CAMERA_REAL_MODEL", folder / "model")).resolve()
    if not (model / "tokenizer_config.json").is_file():  # which is written last
        shutil.rmtree(model, ignore_errors=True)
        write_model(model)
    if not model.is_relative_to(folder):
        (folder / "model").symlink_to(model)
    made = pytestconfig.stash[_WORKSHOP] = Workshop(folder)
    yield made
    shutil.rmtree(folder)


@pytest.fixture
def run(workshop: Workshop) -> Iterator[Callable[[str], Done]]:
    """Run a command of the list by its name."""
    with workshop.using():
        yield workshop.run


@pytest.fixture
def model(workshop: Workshop) -> Path:
    """Folder of the checkpoint."""
    return workshop.model
