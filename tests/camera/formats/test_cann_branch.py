"""How the llama.cpp that defines Q4_0_64 multiplies on an Ascend card, re-enacted from its rules on the bytes that are written here.

The rules were read in its CANN backend (`Lpzhan931/llama.cpp` 521f4fb7), which nobody has run here:

- Loading turns nibbles into signed int4, two to a byte, the first of two weights low. Q4_0_64 is turned over: the codes of one
  column lie together, and so do its scales, [columns / 64, rows]. Q4_0 and Q8_0 keep their rows. Scales lie behind all codes.
- Products are of fp16. At most 65,535 rows go into a call. Codes, scales and results of the next call start behind as many items
  as the last call had, rows times columns. That is so in matrices that keep their rows, and in results of one token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from camera.checkpoints.checkpoint import Checkpoint
from camera.formats.blocks import dequantize, quantize
from camera.formats.cann import MOST_ROWS, why_wrong
from camera.formats.convert import convert_to_gguf, write_twin
from camera.formats.gguf_reader import open_gguf
from camera.formats.quantized_model import QuantizedModel
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import tiny_checkpoint

HEAD_ROWS = 66_048


@dataclass(frozen=True)
class Loaded:
    """A matrix as it lies on the card."""

    codes: np.ndarray
    """Signed, flat; as many others lie behind them, for calls that read past the end."""
    scales: np.ndarray
    """Flat, likewise."""
    rows: int
    columns: int
    group: int
    by_column: bool
    """Whether the codes of a column lie together."""


def loaded(data: np.ndarray, type: BlockType, columns: int) -> Loaded:
    """A matrix of blocks [rows, bytes] as loading lays it out."""
    group, code_bytes = {"q4_0": (32, 16), "q4_0_64": (64, 32), "q8_0": (32, 32)}[type]
    rows = len(data)
    blocks = data.reshape(-1, 2 + code_bytes)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).reshape(rows, -1)
    if type == "q8_0":
        codes = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).reshape(rows, columns)
    else:
        first, second = blocks[:, 2:] & 15, blocks[:, 2:] >> 4  # of a block's halves
        codes = np.concatenate([first, second], axis=1).astype(np.int8).reshape(rows, columns) - 8
    by_column = type == "q4_0_64"
    if by_column:
        codes, scales = turned_over(codes), scales.T
    behind = np.random.default_rng(0).integers(-8, 8, codes.size, dtype=np.int8)
    flat = (
        np.concatenate([codes.ravel(), behind]),
        np.concatenate([scales.ravel(), np.ones(scales.size, np.float16)]),
    )
    return Loaded(*flat, rows, columns, group, by_column)


def turned_over(codes: np.ndarray) -> np.ndarray:
    """[rows, columns] by column, as it is done on packed codes: a byte for each two rows, and half the rows, rounded down, to
    a column."""
    rows, columns = codes.shape
    packed = np.zeros(rows * columns // 2 + 1, np.uint8)
    row, column = np.indices(codes.shape)
    nibbles = (codes.astype(np.uint8) & 15) << (4 * (row % 2)).astype(np.uint8)
    np.bitwise_or.at(packed, (column * (rows // 2) + row // 2).ravel(), nibbles.ravel())
    low, high = (packed & 15).astype(np.int8), (packed >> 4).astype(np.int8)
    both = np.stack([low, high], axis=1).ravel()[: rows * columns]
    return np.where(both > 7, both - 16, both).astype(np.int8)


def calls(rows: int) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each call."""
    for start in range(0, rows // MOST_ROWS * MOST_ROWS + 1, MOST_ROWS):
        yield start, min(MOST_ROWS, rows - start)


def multiplied(matrix: Loaded, x_MK: np.ndarray) -> np.ndarray:
    """The product [tokens, rows] of float32, of which what no call writes stays NaN."""
    tokens, groups = len(x_MK), matrix.columns // matrix.group
    out = np.full(tokens * matrix.rows + tokens * MOST_ROWS * 2, np.nan, np.float32)
    code_at = scale_at = out_at = 0
    for _, rows in calls(matrix.rows):
        steps = (1, matrix.rows) if matrix.by_column else (matrix.columns, 1)
        codes_NK = strided(matrix.codes, code_at, (rows, matrix.columns), steps)
        steps = (1, matrix.rows) if matrix.by_column else (groups, 1)
        scales_NG = strided(matrix.scales, scale_at, (rows, groups), steps)
        weights_NK = codes_NK.astype(np.float32) * scales_NG.astype(np.float32).repeat(matrix.group, axis=1)
        result = strided(out, out_at, (tokens, rows), (matrix.rows, 1), writable=True)
        result[:] = x_MK @ weights_NK.T
        code_at += rows * matrix.columns
        scale_at += rows * groups
        out_at += rows * tokens
    return out[: tokens * matrix.rows].reshape(tokens, matrix.rows)


def strided(
    items: np.ndarray, start: int, shape: tuple[int, int], steps: tuple[int, int], *, writable: bool = False
) -> np.ndarray:
    """A view that may not leave the memory there is."""
    assert start + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) < len(items)
    size = items.itemsize
    view: np.ndarray = as_strided(
        items[start:], shape, (steps[0] * size, steps[1] * size), writeable=writable
    )
    return view


def product(
    data: np.ndarray, type: BlockType, columns: int, tokens: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """What the card makes of a matrix and some tokens, and what is right; both [tokens, rows]."""
    x_MK = np.random.default_rng(1).standard_normal((tokens, columns), np.float32)
    return multiplied(loaded(data, type, columns), x_MK), x_MK @ dequantize(data, type, columns).T


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def right(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.isclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("type", ["q4_0_64", "q4_0", "q8_0"])
def test_a_layers_matrix_is_multiplied_rightly(type: BlockType, tokens: int) -> None:
    found, expected = product(quantize(matrix(320, 192), type), type, 192, tokens)
    assert why_wrong(type, 320) is None
    assert right(found, expected).all()


def test_of_q4_0_64_with_more_rows_the_first_call_alone_is_right() -> None:
    found, expected = product(quantize(matrix(HEAD_ROWS, 128), "q4_0_64"), "q4_0_64", 128)
    assert "66,048" in str(why_wrong("q4_0_64", HEAD_ROWS))
    correct = right(found, expected)[0]
    assert correct[:MOST_ROWS].all()
    assert correct[MOST_ROWS:].mean() < 0.01


def test_of_q4_0_64_with_an_odd_number_of_rows_nearly_nothing_is_right() -> None:
    found, expected = product(quantize(matrix(321, 192), "q4_0_64"), "q4_0_64", 192)
    assert why_wrong("q4_0_64", 321) is not None
    assert right(found, expected).mean() < 0.02


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_what_keeps_its_rows_is_right_for_one_token_however_many_rows_and_not_for_several(
    type: BlockType,
) -> None:
    data = quantize(matrix(HEAD_ROWS, 128), type)
    found, expected = product(data, type, 128)
    assert why_wrong(type, HEAD_ROWS) is None
    assert right(found, expected).all()
    found, expected = product(data, type, 128, tokens=2)
    assert right(found, expected)[0, :MOST_ROWS].all()
    assert not right(found, expected)[:, MOST_ROWS:].any()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny openPangu whose embedding and head have too many rows for one call."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("large"), "PanguEmbedded", hidden=128, vocab=HEAD_ROWS)
    return Checkpoint.open(folder)


def files(source: Checkpoint, folder: Path, **asked: BlockType) -> tuple[Path, list[str]]:
    """The GGUF of a checkpoint, with the packed folder and the twin beside it, and what conversion warned of."""
    quantize_checkpoint(source, folder / "packed", QuantizeOptions(**asked))
    found = convert_to_gguf(folder / "packed", folder / "model.gguf", name="tiny")
    write_twin(folder / "model.gguf", folder / "twin.gguf")
    return folder / "model.gguf", found["warnings"]


def test_by_default_the_head_is_rounded_to_q8_0_and_comes_out_right(
    source: Checkpoint, tmp_path: Path
) -> None:
    path, warnings = files(source, tmp_path)
    head, embedding = (open_gguf(path).tensors[name] for name in ("output.weight", "token_embd.weight"))
    assert (head.type, embedding.type, warnings) == ("q8_0", "q4_0_64", [])
    np.testing.assert_array_equal(head.data, quantize(source.read("lm_head.weight"), "q8_0"))
    found, expected = product(head.data, "q8_0", 128)
    assert right(found, expected).all()
    twin = open_gguf(tmp_path / "twin.gguf").tensors
    assert (twin["output.weight"].type, twin["token_embd.weight"].type) == ("q8_0", "q4_0")
    np.testing.assert_array_equal(twin["output.weight"].data, head.data)


def test_a_4_bit_head_that_is_asked_for_stays_in_the_folder_and_is_q4_0_of_the_same_numbers_in_the_file(
    source: Checkpoint, tmp_path: Path
) -> None:
    path, warnings = files(source, tmp_path, output_type="q4_0_64")
    packed = QuantizedModel.open(tmp_path / "packed")
    head = open_gguf(path).tensors["output.weight"]
    assert (packed.tensors["lm_head.weight"].type, head.type) == ("q4_0_64", "q4_0")
    np.testing.assert_array_equal(dequantize(head.data, "q4_0", 128), packed.dequantize("lm_head.weight"))
    assert (
        [warning for warning in warnings if "output.weight is written as q4_0" in warning] == warnings != []
    )
    found, expected = product(head.data, "q4_0", 128)
    assert right(found, expected).all()
