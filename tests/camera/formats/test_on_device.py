"""Packing by torch's operations alone, as an accelerator does it; here they run on the CPU, and are held to its bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from camera.errors import CameraError
from camera.formats import blocks
from camera.formats.on_device import hard_to_round, packs_like_the_cpu
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS
from tests.camera.formats.in_memory import quantize_measured
from tests.camera.formats.test_blocks import matrices

CPU = torch.device("cpu")


@pytest.mark.parametrize("type", BLOCK_FORMATS)
@settings(deadline=None, max_examples=50)
@given(weight=matrices())
def test_any_numbers_get_the_bytes_of_the_cpu(type: BlockType, weight: np.ndarray) -> None:
    rows = torch.from_numpy(weight)
    try:
        expected = blocks.quantize(rows, type)
    except CameraError:  # f16 holds less than the others
        assert not BLOCK_FORMATS[type].encode_on_device(rows).fits
        return
    encoded = BLOCK_FORMATS[type].encode_on_device(rows)
    np.testing.assert_array_equal(encoded.data.numpy().reshape(expected.shape), expected)
    numbers = blocks.dequantize(expected, type, rows.shape[1])
    np.testing.assert_array_equal(encoded.numbers.numpy().reshape(rows.shape), numbers)
    assert encoded.fits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_every_dtype_gets_the_bytes_of_the_cpu(type: BlockType, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected = blocks.quantize(weight, type)
    found = BLOCK_FORMATS[type].encode_on_device(weight).data
    np.testing.assert_array_equal(found.numpy().reshape(expected.shape), expected)


@pytest.mark.parametrize("type", BLOCK_FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_no_block_holds_is_told(type: BlockType, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 17] = value
    assert not BLOCK_FORMATS[type].encode_on_device(weight).fits


@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_a_device_is_asked_for_numbers_that_are_hard_to_round(
    type: BlockType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packs_like_the_cpu.cache_clear()
    assert packs_like_the_cpu(type, CPU)
    form = BLOCK_FORMATS[type]
    true = form.encode_on_device
    for wrong in (flushed, nudged):
        packs_like_the_cpu.cache_clear()
        monkeypatch.setattr(form, "encode_on_device", lambda chunk, wrong=wrong: true(wrong(chunk)))
        assert not packs_like_the_cpu(type, CPU)
    assert "rounds some weights differently" in caplog.text


def flushed(chunk: torch.Tensor) -> torch.Tensor:
    """As a device that takes small numbers for zero."""
    return torch.where(chunk.abs() < 1.2e-38, 0.0, chunk)


def nudged(chunk: torch.Tensor) -> torch.Tensor:
    """As a device that is wrong in the last bit."""
    nearer_zero = torch.nextafter(chunk, torch.zeros(()))
    if chunk.shape[1] > 1:
        nearer_zero[:, 0] = chunk[:, 0]
    return nearer_zero


@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_a_device_that_lacks_an_operation_is_not_used(
    type: BlockType, caplog: pytest.LogCaptureFixture
) -> None:
    packs_like_the_cpu.cache_clear()
    assert not packs_like_the_cpu(type, torch.device("meta"))  # has no numbers to give back
    assert "meta cannot" in caplog.text
    weight = torch.randn(8, 64)
    parts: list[np.ndarray] = []
    blocks.store(weight, type, lambda start, data: parts.append(data.copy()), device=torch.device("meta"))
    np.testing.assert_array_equal(parts[0], blocks.quantize(weight, type))


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e22])
@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_what_a_device_measures_is_what_the_cpu_measures(type: BlockType, size: float) -> None:
    if size > 1 and type not in ("f32", "bf16"):
        size = 1e3
    weight = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)) * size
    data, squares = blocks._store_on_device(BLOCK_FORMATS[type], weight, CPU, "the tensor")
    expected, measured = quantize_measured(weight, type)
    np.testing.assert_array_equal(data, expected)
    assert squares.power == pytest.approx(measured.power, rel=1e-6)
    assert squares.noise == pytest.approx(measured.noise, rel=1e-6)


def test_every_type_holds_what_is_hard_to_round() -> None:
    assert hard_to_round(64).abs().max() < 65504
