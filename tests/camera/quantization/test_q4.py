import numpy as np
import pytest
import torch

from camera.formats import blocks
from camera.options import BlockType
from camera.quantization.q4 import nearest_codes, pack, to_fp16
from camera.registry import BLOCK_FORMATS


@pytest.mark.parametrize("kind", ["q4_0", "q4_0_64"])
def test_what_is_packed_is_what_the_format_reads(kind: BlockType) -> None:
    length = BLOCK_FORMATS[kind].block_length
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, 3 * length), generator=generator).float()
    scales = to_fp16(torch.randn(5, 3, generator=generator))
    stored = blocks.dequantize(pack(codes, scales, kind), kind, 3 * length)
    np.testing.assert_array_equal(stored, (codes * scales.repeat_interleave(length, 1)).numpy())


@pytest.mark.parametrize("kind", ["q4_0", "q4_0_64"])
def test_the_plain_formats_own_codes_pack_to_its_own_bytes(kind: BlockType) -> None:
    length = BLOCK_FORMATS[kind].block_length
    weight = torch.randn(4, 2 * length, generator=torch.Generator().manual_seed(1))
    plain = blocks.quantize(weight, kind)
    scales = torch.from_numpy(plain.reshape(-1, 2 + length // 2)[:, :2].copy()).view(torch.float16).float()
    stored = torch.from_numpy(blocks.dequantize(plain, kind, 2 * length)).reshape(-1, length)
    codes = nearest_codes(stored, scales[:, 0])
    np.testing.assert_array_equal(pack(codes.reshape(4, -1), scales.reshape(4, -1), kind), plain)


def test_a_scale_of_zero_gives_codes_of_zero() -> None:
    assert nearest_codes(torch.tensor([[1.0, -2.0]]), torch.zeros(1)).tolist() == [[0.0, 0.0]]


def test_a_scale_is_rounded_as_fp16_and_never_to_infinity() -> None:
    assert to_fp16(torch.tensor([0.1, 1e6, -1e6, 1e-9])).tolist() == [
        float(np.float16(0.1)),
        65504.0,
        -65504.0,
        0.0,
    ]
