import re
from pathlib import Path

import numpy as np
import pytest

from camera.mapped import release_pages

SMAPS = Path("/proc/self/smaps")


def resident_kilobytes(file: Path) -> int:
    """Of the maps of a file."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)
    return sum(int(re.findall(r"^Rss:\s+(\d+)", part, re.MULTILINE)[0]) for part in maps if str(file) in part)


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what is resident")
def test_pages_that_were_read_are_released_and_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(range(256)) * (1 << 13))
    mapped = np.memmap(file, np.uint8, "r", 12, (1 << 20,))
    total = int(mapped.astype(np.int64).sum())
    assert resident_kilobytes(file) >= 1024
    release_pages(mapped[: 1 << 19])
    assert resident_kilobytes(file) <= 640
    assert int(mapped.astype(np.int64).sum()) == total


def test_an_array_in_memory_of_its_own_is_left_alone() -> None:
    array = np.arange(1 << 16, dtype=np.uint8)
    release_pages(array[100:])
    assert array[200] == 200
