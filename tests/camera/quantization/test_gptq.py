import numpy as np
import pytest
import torch

from camera.errors import CameraError
from camera.formats import blocks
from camera.options import BlockType
from camera.quantization.compensation import compensated_codes, inverse_factor, quantize_by_gptq
from camera.quantization.methods.search import quantize_by_search
from camera.quantization.q4 import error_by_products, error_by_squares

KINDS: list[BlockType] = ["q4_0", "q4_0_64"]


def correlated(width: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs that have a lot to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator).mul(0.5) + torch.randn(
        width, 1, generator=generator
    )
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return (inputs.T @ inputs).double()


def stored(data: np.ndarray, kind: BlockType, width: int) -> torch.Tensor:
    return torch.from_numpy(blocks.dequantize(data, kind, width))


def naive(weight: torch.Tensor, moments: torch.Tensor, damping: float, scales: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper with no shortcut, for given scales: the inverse is made anew for every column."""
    rest = weight.double().clone()
    codes = torch.empty_like(rest)
    matrix = moments.double() + damping * moments.diagonal().mean() * torch.eye(
        len(moments), dtype=torch.float64
    )
    length = rest.shape[1] // scales.shape[1]
    for column in range(rest.shape[1]):
        inverse = torch.linalg.inv(matrix[column:, column:])
        scale = scales[:, column // length].double()
        codes[:, column] = (rest[:, column] / scale).round().clamp(-8, 7)
        error = (rest[:, column] - codes[:, column] * scale) / inverse[0, 0]
        rest[:, column + 1 :] -= error[:, None] * inverse[0, 1:]
    return codes


def test_codes_are_those_of_the_papers_algorithm_without_its_shortcuts() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    moments = correlated(64)
    factor = inverse_factor(moments, 0.01)
    codes, scales = compensated_codes(weight, factor, moments.diagonal().float(), 32)
    expected = naive(weight, moments, 0.01, scales)
    assert (codes == expected).float().mean() > 0.99  # a tie may fall the other way in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_layers_output_loses_far_less_than_with_either_search_or_rounding(
    kind: BlockType, seed: int
) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed))
    moments = correlated(256, seed=seed)
    importance = moments.diagonal()
    losses = [
        error_by_products(weight, stored(data, kind, 256), moments)
        for data in (
            quantize_by_gptq(weight, kind, inverse_factor(moments, 0.01), importance),
            quantize_by_search(weight, kind, importance),
            blocks.quantize(weight, kind),
        )
    ]
    assert losses[0] < 0.7 * min(losses[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_with_inputs_that_are_not_correlated_there_is_nothing_to_compensate(kind: BlockType) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    data = quantize_by_gptq(weight, kind, inverse_factor(importance.diag(), 1e-9), importance)
    np.testing.assert_allclose(
        error_by_squares(weight, stored(data, kind, 128), importance),
        error_by_squares(weight, stored(quantize_by_search(weight, kind, importance), kind, 128), importance),
        rtol=1e-5,
    )


def test_a_row_is_rounded_alike_whatever_other_rows_there_are() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    moments = correlated(128)
    factor = inverse_factor(moments, 0.01)
    data = quantize_by_gptq(weight, "q4_0", factor, moments.diagonal())
    half = quantize_by_gptq(weight[:16], "q4_0", factor, moments.diagonal())
    assert (data[:16] == half).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: BlockType) -> None:
    data = quantize_by_gptq(torch.zeros(3, 128), kind, inverse_factor(correlated(128), 0.01))
    assert not stored(data, kind, 128).any()


def test_an_input_that_never_was_anything_leaves_its_column_rounded_to_the_nearest() -> None:
    moments = correlated(64)
    moments[5, :] = moments[:, 5] = 0
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = stored(quantize_by_gptq(weight, "q4_0", inverse_factor(moments, 0.01)), "q4_0", 64)
    assert (found[:, 5] - weight[:, 5]).abs().max() < 0.35  # half a step of a block that reaches to about 3


def test_fewer_tokens_than_columns_are_enough() -> None:
    moments = correlated(128, tokens=10)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    data = quantize_by_gptq(weight, "q4_0", inverse_factor(moments, 0.01))
    plain = error_by_products(weight, stored(blocks.quantize(weight, "q4_0"), "q4_0", 128), moments)
    assert error_by_products(weight, stored(data, "q4_0", 128), moments) < plain


def test_damping_is_raised_where_the_moments_cannot_be_factored() -> None:
    rank_one = torch.ones(64, 64, dtype=torch.float64) * 1e3
    rank_one[0, 0] -= 40  # not even positive
    assert inverse_factor(rank_one, 1e-4).isfinite().all()


def test_inputs_that_were_never_anything_at_all_are_taken_as_not_correlated() -> None:
    torch.testing.assert_close(inverse_factor(torch.zeros(8, 8), 0.01), torch.eye(8))


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    moments = correlated(32)
    upper = inverse_factor(moments, 0.05).double()
    mean = moments.diagonal().mean()
    damped = moments / mean + 0.05 * torch.eye(32)
    torch.testing.assert_close(
        upper.T @ upper @ damped, torch.eye(32, dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert not upper.tril(-1).any()


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CameraError, match="down_proj: the second moments of its inputs are not finite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01, name="down_proj")


def test_what_no_block_can_hold_is_refused_by_its_name() -> None:
    with pytest.raises(CameraError, match="o_proj holds NaN"):
        quantize_by_gptq(torch.full((2, 32), torch.nan), "q4_0", torch.eye(32), name="o_proj")
