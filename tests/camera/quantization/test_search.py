import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera.errors import CameraError
from camera.formats import blocks
from camera.options import BlockType
from camera.quantization.q4 import nearest_codes
from camera.quantization.scales import (
    best_scales,
    weighted_error,
)
from camera.registry import BLOCK_FORMATS
from tests.camera.formats.in_memory import quantize_by_search

KINDS: list[BlockType] = ["q4_0", "q4_0_64"]


def error(
    weight: torch.Tensor, data: np.ndarray, kind: BlockType, importance: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Weighted squared error of each block."""
    stored = torch.from_numpy(blocks.dequantize(data, kind, weight.shape[1]))
    squares = (stored - weight).double().square() * importance
    return squares.reshape(-1, BLOCK_FORMATS[kind].block_length).sum(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1e-8, 1e-6, 1e-3, 1.0, 1e4]),
    spread=st.floats(0, 3),
)
def test_no_block_has_more_weighted_error_than_rounding_to_nearest(
    seed: int, kind: BlockType, size: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 128, generator=generator) * size
    weight *= torch.randn(3, 128, generator=generator).mul(spread).exp().clamp_max(10)
    importance = torch.randn(128, generator=generator).mul(2).exp()
    searched = error(weight, quantize_by_search(weight, kind, importance), kind, importance)
    plain = error(weight, blocks.quantize(weight, kind), kind, importance)
    assert bool((searched <= plain * (1 + 1e-5)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_lose_clearly_less(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    importance = torch.randn(256, generator=generator).mul(2).exp()
    searched = error(weight, quantize_by_search(weight, kind, importance), kind, importance).sum()
    assert searched < 0.8 * error(weight, blocks.quantize(weight, kind), kind, importance).sum()


def test_the_scale_found_is_near_the_best_of_all_that_fp16_holds() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, 32, generator=generator)
    importance = torch.rand(32, generator=generator)
    found = best_scales(weight, importance)
    grid = torch.cat([sign * torch.linspace(0.05, 0.6, 3000) for sign in (1, -1)]).half().float()
    losses = torch.stack(
        [
            weighted_error(weight, nearest_codes(weight, each.expand(20)), each.expand(20), importance)
            for each in grid
        ]
    )
    mine = weighted_error(weight, nearest_codes(weight, found), found, importance)
    assert mine.sum() < 1.05 * losses.min(0).values.sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_scale_takes_either_sign_so_that_the_largest_weight_may_be_at_the_longer_end(sign: int) -> None:
    weight = (
        sign * torch.linspace(-7, 8, 32)[None]
    )  # from −7 to 8 in the units of the scale: only −d reaches 8
    scale = best_scales(weight, torch.ones(32))
    assert scale.item() * sign < 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_a_constant_is_exact(kind: BlockType) -> None:
    length = BLOCK_FORMATS[kind].block_length
    weight = torch.tensor([0.0, 0.5, -0.5, 0.375])[:, None].repeat(1, length)
    stored = blocks.dequantize(quantize_by_search(weight, kind), kind, length)
    np.testing.assert_allclose(stored, weight.numpy(), rtol=1e-3)
    assert not stored[0].any()


def test_columns_that_matter_are_kept_at_the_cost_of_those_that_do_not() -> None:
    weight = torch.tensor([4.0] + [1.0] * 31)[None] * torch.linspace(0.5, 1, 32)
    importance = torch.tensor([1e-3] + [1.0] * 31)
    weighted, plain = (
        (blocks.dequantize(data, "q4_0", 32) - weight.numpy())[0, 1:]
        for data in (quantize_by_search(weight, "q4_0", importance), quantize_by_search(weight, "q4_0"))
    )
    assert np.square(weighted).sum() < 0.9 * np.square(plain).sum()


def test_a_block_whose_inputs_were_never_anything_is_searched_with_equal_weights() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.cat([torch.zeros(32), torch.ones(32)])
    np.testing.assert_array_equal(
        quantize_by_search(weight, "q4_0", importance), quantize_by_search(weight, "q4_0")
    )


def test_the_threads_do_not_change_the_bytes() -> None:
    weight = torch.randn(600, 1024, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(quantize_by_search(weight, "q4_0_64"))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_no_block_can_hold_is_refused_by_its_name(value: float) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = value
    with pytest.raises(CameraError, match="the tensor holds"):
        quantize_by_search(weight, "q4_0")
