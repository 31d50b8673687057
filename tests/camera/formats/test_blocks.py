import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camera.errors import CameraError
from camera.formats.blocks import dequantize, quantize
from camera.formats.types.q4_0_64 import Q4_0_64
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS
from tests.camera.formats.in_memory import measure, quantize_measured

LIBRARY = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FOUR_BIT = ("q4_0", "q4_0_64")
# Of all sizes that a scale can take: from subnormals of float32 to the largest that fp16 can scale.
EXPONENTS = st.integers(-149, 18)


@st.composite
def matrices(draw: st.DrawFn, row_length: int = 128) -> np.ndarray:
    """float32 rows whose blocks differ in size by many powers of two, with zeros and equal magnitudes in them."""
    rows = draw(st.integers(1, 3))
    small = st.integers(-16, 16)
    mantissas = draw(hnp.arrays(np.int32, (rows, row_length), elements=small | st.integers(-(2**23), 2**23)))
    exponents = draw(hnp.arrays(np.int32, (rows, row_length // 32), elements=EXPONENTS))
    values = np.ldexp(mantissas / 2.0**23, np.repeat(exponents, 32, axis=1))
    minus_zeros = draw(hnp.arrays(np.bool_, (rows, row_length)))
    return np.where((values == 0) & minus_zeros, -0.0, values).astype(np.float32)


def by_the_library(weight: np.ndarray, type: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quantize(weight, LIBRARY[type])


def q4_0_64_one_weight_at_a_time(row: np.ndarray) -> bytes:
    """The rules of docs/formats.md as a person would follow them with a pencil."""
    out = b""
    for start in range(0, len(row), 64):
        block = [np.float32(value) for value in row[start : start + 64]]
        extreme = block[0]
        for value in block:
            if abs(value) > abs(extreme):
                extreme = value
        with np.errstate(all="ignore"):
            scale = np.float32(extreme / np.float32(-8))
            inverse = np.float32(0) if scale == 0 else np.float32(np.float32(1) / scale)
            codes = []
            for value in block:
                shifted = np.float32(np.float32(value * inverse) + np.float32(8.5))
                codes.append(min(15, int(shifted)) if np.isfinite(inverse) else 0)
            out += np.float16(scale).tobytes()
        out += bytes(codes[j] | codes[j + 32] << 4 for j in range(32))
    return out


@pytest.mark.parametrize("type", LIBRARY)
@settings(deadline=None, max_examples=150)
@given(weight=matrices())
def test_stock_types_have_the_bytes_of_the_gguf_library(type: BlockType, weight: np.ndarray) -> None:
    np.testing.assert_array_equal(quantize(torch.from_numpy(weight), type), by_the_library(weight, type))


@settings(deadline=None, max_examples=80)
@given(weight=matrices())
def test_q4_0_64_follows_its_rules_to_the_bit(weight: np.ndarray) -> None:
    packed = quantize(torch.from_numpy(weight), "q4_0_64")
    assert [row.tobytes() for row in packed] == [q4_0_64_one_weight_at_a_time(row) for row in weight]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type", LIBRARY)
def test_every_dtype_is_packed_from_its_float32_value(type: BlockType, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    np.testing.assert_array_equal(quantize(weight, type), by_the_library(weight.float().numpy(), type))


@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_chunks_of_rows_do_not_show_in_the_result(type: BlockType) -> None:
    weight = torch.randn(
        2500, 512, generator=torch.Generator().manual_seed(0)
    )  # a chunk is a million weights
    parts = [quantize(rows, type) for rows in weight.split(700)]
    whole = quantize(weight, type)
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    numbers = [dequantize(part, type, 512) for part in parts]
    np.testing.assert_array_equal(dequantize(whole, type, 512), np.concatenate(numbers))


@pytest.mark.parametrize("type", LIBRARY)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_bytes_of_a_stock_type_read_as_the_gguf_library_reads_them(
    type: BlockType, data: st.DataObject
) -> None:
    raw = data.draw(hnp.arrays(np.uint8, (2, BLOCK_FORMATS[type].row_bytes(64))))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(dequantize(raw, type, 64), gguf.dequantize(raw, LIBRARY[type]))


@settings(deadline=None, max_examples=50)
@given(raw=hnp.arrays(np.uint8, (2, BLOCK_FORMATS["q4_0_64"].row_bytes(192))))
def test_the_twin_of_any_q4_0_64_holds_the_same_numbers(raw: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        expected = dequantize(raw, "q4_0_64", 192)
        np.testing.assert_array_equal(dequantize(Q4_0_64().twin(raw), "q4_0", 192), expected)
        np.testing.assert_array_equal(gguf.dequantize(Q4_0_64().twin(raw), LIBRARY["q4_0"]), expected)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_float_types_hold_what_torch_rounds_to(type: BlockType) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[type]
    stored = torch.from_numpy(dequantize(quantize(weight, type), type, 5))
    assert torch.equal(stored, weight.to(dtype).float())


@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_a_tensor_of_zeros_stays_one(type: BlockType) -> None:
    assert not dequantize(quantize(torch.zeros(2, 64), type), type, 64).any()


@pytest.mark.parametrize("value", [1.0, -0.5, 448.0])
@pytest.mark.parametrize("type", FOUR_BIT)
def test_a_constant_that_fp16_can_scale_is_exact(type: BlockType, value: float) -> None:
    stored = dequantize(quantize(torch.full((2, 64), value), type), type, 64)
    assert (stored == value).all()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type", BLOCK_FORMATS)
def test_what_packing_measures_is_the_float64_sum_of_squares(
    type: BlockType, dtype: torch.dtype, size: float
) -> None:
    if size > 1 and type not in ("f32", "bf16"):
        size = 1e4 if type != "f16" else 1e3
    weight = (torch.randn(2500, 512, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    packed, squares = quantize_measured(weight, type)
    np.testing.assert_array_equal(packed, quantize(weight, type))
    assert squares == measure(weight, packed, type)
    exact = weight.double()
    noise = torch.from_numpy(dequantize(packed, type, 512)).double() - exact
    assert squares.power == pytest.approx(float(exact.square().sum()), rel=1e-7)
    assert squares.noise == pytest.approx(float(noise.square().sum()), rel=1e-7)


def test_equal_magnitudes_of_either_sign_are_scaled_by_the_first() -> None:
    weight = torch.randint(-3, 4, (512, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    np.testing.assert_array_equal(quantize(weight, "q4_0"), by_the_library(weight.float().numpy(), "q4_0"))


def test_a_vector_is_one_row() -> None:
    assert quantize(torch.ones(96), "q8_0").shape == (1, 3 * 34)


@pytest.mark.parametrize("type", BLOCK_FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_the_tensors_name(type: BlockType, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 17] = value
    with pytest.raises(CameraError, match=r"layers\.3\.down.* NaN or infinity"):
        quantize(weight, type, name="layers.3.down")


@pytest.mark.parametrize(("type", "value"), [("q4_0", 6e5), ("q4_0_64", -6e5), ("q8_0", 1e7), ("f16", 7e4)])
def test_a_value_beyond_fp16_is_refused_by_the_tensors_name(type: BlockType, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 17] = value
    with pytest.raises(CameraError, match=r"embedding.*too large for"):
        quantize(weight, type, name="embedding")


def test_the_largest_value_that_fp16_can_scale_is_stored() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 5] = 65504 * 8
    assert dequantize(quantize(weight, "q4_0_64"), "q4_0_64", 64)[0, 5] == 65504 * 8


@pytest.mark.parametrize(("type", "length"), [("q4_0", 48), ("q8_0", 33), ("q4_0_64", 96)])
def test_rows_that_are_no_whole_blocks_are_refused(type: BlockType, length: int) -> None:
    with pytest.raises(CameraError, match="blocks are"):
        quantize(torch.ones(2, length), type)


def test_bytes_of_another_row_length_are_refused() -> None:
    with pytest.raises(CameraError, match="rows of 128 weights"):
        dequantize(np.zeros((2, 34), np.uint8), "q4_0_64", 128)


def test_q4_0_64_takes_four_and_a_quarter_bits() -> None:
    assert BLOCK_FORMATS["q4_0_64"].bits_per_weight == 4.25
    assert quantize(torch.ones(3, 128), "q4_0_64").nbytes == 3 * 128 * 4.25 / 8
