import pytest
import torch

from camera.errors import CameraError
from camera.quantization.factor import Factor, factor_moments
from tests.camera.quantization.losses import correlated


def product(factor: Factor) -> torch.Tensor:
    upper = factor.feedback_II.double()
    return upper @ factor.loss_I.double().diag() @ upper.T


@pytest.mark.parametrize("width", [32, 1100])  # one block of columns, and several
def test_the_factor_multiplies_to_the_damped_moments(width: int) -> None:
    moments = correlated(width)
    factor = factor_moments(moments.clone(), 0.05)
    damped = moments / moments.diagonal().mean() + 0.05 * torch.eye(width)
    torch.testing.assert_close(product(factor), damped, rtol=1e-4, atol=1e-4)
    assert torch.equal(factor.feedback_II, factor.feedback_II.triu())
    assert torch.equal(factor.feedback_II.diagonal(), torch.ones(width))
    torch.testing.assert_close(factor.added_I, torch.full((width,), 0.05))


def test_what_is_above_the_diagonal_is_not_read() -> None:
    whole, lower = (factor_moments(moments, 0.01) for moments in (correlated(700), correlated(700).tril()))
    assert torch.equal(whole.feedback_II, lower.feedback_II)


def test_damping_is_raised_where_the_moments_cannot_be_factored() -> None:
    rank_one = torch.ones(600, 600, dtype=torch.float64) * 1e3
    rank_one[0, 0] -= 40  # not even positive
    factor = factor_moments(rank_one.clone(), 1e-4)
    assert factor.added_I[0] > 1e-3
    damped = rank_one / rank_one.diagonal().mean() + factor.added_I.diag()
    torch.testing.assert_close(product(factor), damped, rtol=1e-4, atol=1e-4)


def test_damping_is_raised_where_float32_cannot_tell_the_moments_from_others() -> None:
    moments = correlated(600, tokens=5)
    exact, rounded = (
        factor_moments(moments.to(dtype, copy=True), 1e-5) for dtype in (torch.float64, torch.float32)
    )
    assert rounded.added_I[0] > exact.added_I[0] == pytest.approx(1e-5)


def test_float32_will_do_with_the_usual_damping() -> None:
    moments = correlated(600, tokens=100)
    exact, rounded = (
        factor_moments(moments.to(dtype, copy=True), 0.01) for dtype in (torch.float64, torch.float32)
    )
    assert torch.equal(rounded.added_I, exact.added_I)
    torch.testing.assert_close(rounded.feedback_II, exact.feedback_II, rtol=0.01, atol=0.01)


def test_inputs_that_were_never_anything_at_all_are_taken_as_not_correlated() -> None:
    factor = factor_moments(torch.zeros(8, 8, dtype=torch.float64), 0.01)
    torch.testing.assert_close(product(factor), torch.eye(8, dtype=torch.float64))


def test_an_input_that_never_was_anything_is_taken_as_an_average_one() -> None:
    moments = correlated(64)
    moments[5, :] = moments[:, 5] = 0
    factor = factor_moments(moments, 0.01)
    assert factor.loss_I[5] == pytest.approx(1.01)
    assert factor.added_I[5] == pytest.approx(1.01)
    assert factor.feedback_II[5].count_nonzero() == factor.feedback_II[:, 5].count_nonzero() == 1


def test_moments_that_are_not_finite_are_refused() -> None:
    inputs = torch.randn(9, 4, dtype=torch.float64)
    inputs[3, 2] = torch.inf
    with pytest.raises(CameraError, match="down_proj: the second moments of its inputs are not finite"):
        factor_moments(inputs.T @ inputs, 0.01, name="down_proj")
