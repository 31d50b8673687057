"""Matrices are packed by rows: nothing depends on how, and memory not on how large they are."""

import subprocess
import sys
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch

from camera.checkpoints.rows import StoredRows
from camera.checkpoints.safetensors_file import read_header, write_tensors
from camera.errors import CameraError
from camera.formats import blocks
from camera.formats.blocks import Put
from camera.quantization.methods.search import store_by_search
from camera.registry import BLOCK_FORMATS
from tests.camera.formats.in_memory import measure, quantize_by_search
from tests.camera.quantization.losses import error_by_squares

WIDTH = 512
ROWS = 2 * blocks.CHUNK_WEIGHTS // WIDTH + 37


def in_a_file(path: Path, tensor: torch.Tensor) -> StoredRows:
    write_tensors(path, {"x": tensor})
    return StoredRows(path, "x", read_header(path)["x"])


def collected(rows: int, row_bytes: int) -> tuple[np.ndarray, Put]:
    """Bytes, and what puts them there, each row once."""
    data = np.zeros((rows, row_bytes), np.uint8)
    seen = np.zeros(rows, bool)

    def put(start: int, part: np.ndarray) -> None:
        assert not seen[start : start + len(part)].any()
        seen[start : start + len(part)] = True
        data[start : start + len(part)] = part

    return data, put


def matrix(rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_a_matrix_in_a_file_has_the_bytes_and_errors_of_one_in_memory(
    tmp_path: Path, type: str, dtype: torch.dtype
) -> None:
    weight = matrix(dtype=dtype)
    data, put = collected(ROWS, BLOCK_FORMATS[type].row_bytes(WIDTH))
    squares = blocks.store(in_a_file(tmp_path / "x", weight), type, put)
    np.testing.assert_array_equal(data, blocks.quantize(weight, type))
    assert squares == measure(weight, data, type)


@pytest.mark.parametrize("weighted", [True, False])
def test_search_by_rows_finds_what_it_finds_in_the_whole_matrix(tmp_path: Path, weighted: bool) -> None:
    weight = matrix(700)
    importance = torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)) if weighted else None
    data, put = collected(700, BLOCK_FORMATS["q4_0"].row_bytes(WIDTH))
    found = store_by_search(in_a_file(tmp_path / "x", weight), "q4_0", put, importance)
    parts = [quantize_by_search(rows, "q4_0", importance) for rows in weight.split(512)]
    np.testing.assert_array_equal(data, np.concatenate(parts))
    assert found.squares.noise == pytest.approx(measure(weight, data, "q4_0").noise, rel=1e-9)
    if importance is None:
        assert found.weighted_error is None
    else:
        numbers = torch.from_numpy(blocks.dequantize(data, "q4_0", WIDTH))
        expected = error_by_squares(weight.float(), numbers, importance)
        assert found.weighted_error == pytest.approx(expected, rel=1e-9)


def test_after_an_error_no_thread_writes_any_more() -> None:
    weight = matrix()
    weight[0, 0] = float("nan")
    writing: list[int] = []

    def put(start: int, data: np.ndarray) -> None:
        writing.append(start)
        sleep(0.05)
        writing.remove(start)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(CameraError, match="NaN"):
            blocks.store(weight, "q4_0", put)
        assert not writing
    finally:
        torch.set_num_threads(before)


GROWTH = """
import re, sys
from pathlib import Path
import torch
from camera.checkpoints.rows import StoredRows
from camera.checkpoints.safetensors_file import SafetensorsWriter, TensorInfo
from camera.formats import blocks
from camera.quantization.methods.search import store_by_search
from camera.registry import BLOCK_FORMATS
from tests.camera.quantization.losses import error_by_squares

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, width, form = Path(sys.argv[1]), 1024, BLOCK_FORMATS["q4_0"]
peaks = []
some = torch.randn(1024, width).bfloat16().view(torch.uint8).numpy().tobytes()
for rows in (4096, 32768):
    with (folder / "source").open("wb") as file:
        for _ in range(rows // 1024):
            file.write(some)
    source = StoredRows(folder / "source", "x", TensorInfo("source", torch.bfloat16, (rows, width), 0))
    with SafetensorsWriter(folder / "packed", {"x": (torch.uint8, (rows, form.row_bytes(width)))}) as writer:
        put = lambda start, data: writer.write_rows("x", start, torch.from_numpy(data))
        blocks.store(source, "q4_0", put)
    part = StoredRows(folder / "source", "x", TensorInfo("source", torch.bfloat16, (rows // 16, width), 0))
    store_by_search(part, "q4_0", lambda start, data: None)
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system tells no peak of memory")
def test_memory_does_not_grow_with_the_rows_of_a_matrix(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 16 << 20  # the larger matrix is of 64 MiB, and packed of 18
