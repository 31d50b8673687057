"""OBS removes what the others can best take over, and knows it after every removal."""

import pytest
import torch

from camera.layerwise.gram import Moments
from camera.pruning.methods.obs import obs_channels
from camera.pruning.methods.refit import refit
from tests.camera.pruning.test_refit import example

DAMPING = 1e-3


def loss(gram_FF: torch.Tensor, down_HF: torch.Tensor, kept: list[int]) -> float:
    """What the least-squares refit to these channels loses, its penalty on all weights included."""
    new_HK = refit(Moments(gram_FF), down_HF, torch.tensor(kept), DAMPING)
    assert new_HK is not None
    lost_HF = down_HF.clone()
    lost_HF[:, kept] -= new_HK
    damped_FF = gram_FF + DAMPING * gram_FF.diagonal().mean() * torch.eye(len(gram_FF))
    return float(((lost_HF @ damped_FF) * lost_HF).sum())


def brute_force(gram_FF: torch.Tensor, down_HF: torch.Tensor, count: int) -> list[int]:
    """One by one, the channel whose removal loses least after everything that is left has been refitted."""
    kept = list(range(len(gram_FF)))
    while len(kept) > count:
        kept.remove(min(kept, key=lambda out: loss(gram_FF, down_HF, [c for c in kept if c != out])))
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_rounds_of_one_equal_a_brute_force_search_with_a_refit_of_every_candidate(seed: int) -> None:
    act_TF, down_HF = example(seed)
    gram_FF = act_TF.T @ act_TF
    for count in (9, 6, 2):
        found = obs_channels(Moments(gram_FF), down_HF, count, DAMPING, per_round=1)
        assert found is not None
        assert found.tolist() == brute_force(gram_FF, down_HF, count)


def test_the_first_round_removes_the_cheapest_of_the_whole_layer() -> None:
    act_TF, down_HF = example()
    gram_FF = act_TF.T @ act_TF
    singly = [loss(gram_FF, down_HF, [c for c in range(10) if c != out]) for out in range(10)]
    cheapest = torch.tensor(singly).argsort()[:4]
    found = obs_channels(Moments(gram_FF), down_HF, 6, DAMPING, per_round=4)
    assert found is not None
    assert set(found.tolist()) == set(range(10)) - set(cheapest.tolist())


def test_of_two_channels_that_do_the_same_one_stays() -> None:
    act_TF, down_HF = example()
    act_TF[:, 4] = act_TF[:, 3]
    down_HF[:, 3] *= 10
    found = obs_channels(Moments(act_TF.T @ act_TF), down_HF, 9, DAMPING, per_round=1)
    assert found is not None
    assert len({3, 4} & set(found.tolist())) == 1


def test_keeping_all_keeps_all_and_nothing_is_changed() -> None:
    act_TF, down_HF = example()
    gram_FF = act_TF.T @ act_TF
    given = gram_FF.clone(), down_HF.clone()
    found = obs_channels(Moments(gram_FF), down_HF, 10, DAMPING, per_round=3)
    assert found is not None
    assert found.tolist() == list(range(10))
    obs_channels(Moments(gram_FF), down_HF, 5, DAMPING, per_round=3)
    assert torch.equal(gram_FF, given[0])
    assert torch.equal(down_HF, given[1])


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_what_cannot_be_inverted_is_not(value: float) -> None:
    gram_FF = torch.full((10, 10), value, dtype=torch.float64)
    assert obs_channels(Moments(gram_FF), example()[1], 5, DAMPING, per_round=1) is None
