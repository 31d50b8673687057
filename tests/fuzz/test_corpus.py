"""What fuzzing once found is read or refused: every kept input, by every reader's own corpus."""

from contextlib import suppress
from pathlib import Path

import pytest

from camera.errors import CameraError
from tests.fuzz.names import NAMES
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


def test_every_reader_is_fuzzed_by_its_name() -> None:
    assert list(TARGETS) == NAMES
    assert {path.parent.name for path in KEPT} <= set(NAMES)


@pytest.mark.parametrize("name", sorted({path.parent.name for path in KEPT}))
def test_kept_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)
    target.read(target.seed)
    for path in KEPT:
        if path.parent.name == name:
            with suppress(CameraError):
                target.read(path.read_bytes())
