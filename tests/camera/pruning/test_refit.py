"""A refit is the least-squares solution, and so is what its error says of it."""

import pytest
import torch

from camera.layerwise.gram import Moments
from camera.pruning.methods.refit import output_error, refit

KEPT = torch.tensor([0, 2, 3, 7, 8])


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [40, 10] of correlated channels, and a down projection [6, 10]."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(10, 10, generator=chance, dtype=torch.float64)
    act_TF = torch.randn(40, 10, generator=chance, dtype=torch.float64) @ mixing
    return act_TF, torch.randn(6, 10, generator=chance, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damping", [1e-4, 1e-3, 0.5])
def test_it_equals_a_direct_least_squares_solution(seed: int, damping: float) -> None:
    act_TF, down_HF = example(seed)
    penalty = damping * act_TF.square().sum(0).mean()
    system = torch.cat([act_TF[:, KEPT], penalty.sqrt() * torch.eye(len(KEPT), dtype=torch.float64)])
    wanted = torch.cat([act_TF @ down_HF.T, penalty.sqrt() * down_HF[:, KEPT].T])
    direct = torch.linalg.lstsq(system, wanted).solution.T
    found = refit(Moments(act_TF.T @ act_TF), down_HF, KEPT, damping)
    assert found is not None
    torch.testing.assert_close(found, direct)


def test_the_more_damping_the_nearer_to_the_weights_as_they_were() -> None:
    act_TF, down_HF = example()
    gram_FF = act_TF.T @ act_TF
    distances = [
        float((found - down_HF[:, KEPT]).norm())
        for damping in (1e-3, 1.0, 1e3, 1e12)
        if (found := refit(Moments(gram_FF), down_HF, KEPT, damping)) is not None
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] < 1e-9


def test_channels_that_do_what_removed_ones_did_make_the_loss_good() -> None:
    act_TF, down_HF = example()
    act_TF[:, 1], act_TF[:, 4] = 2 * act_TF[:, 0], act_TF[:, 2] - act_TF[:, 8]
    kept_K = torch.tensor([0, 2, 3, 5, 6, 7, 8, 9])
    gram_FF = act_TF.T @ act_TF
    found = refit(Moments(gram_FF), down_HF, kept_K, 1e-9)
    assert found is not None
    assert output_error(gram_FF, down_HF, kept_K, down_HF[:, kept_K]) > 0.05
    assert output_error(gram_FF, down_HF, kept_K, found) < 1e-9


def test_the_error_is_the_share_of_the_output_that_is_lost() -> None:
    act_TF, down_HF = example()
    new_HK = torch.randn(6, len(KEPT), dtype=torch.float64)
    whole = act_TF @ down_HF.T
    lost = whole - act_TF[:, KEPT] @ new_HK.T
    expected = float(lost.square().sum() / whole.square().sum())
    assert output_error(act_TF.T @ act_TF, down_HF, KEPT, new_HK) == pytest.approx(expected)
    everything = torch.arange(10)
    assert output_error(act_TF.T @ act_TF, down_HF, everything, down_HF) == 0


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_what_cannot_be_solved_is_not(value: float) -> None:
    assert refit(Moments(torch.full((10, 10), value, dtype=torch.float64)), example()[1], KEPT, 1e-3) is None
