"""Zeros fall where Wanda's metric is least in every row."""

import pytest
import torch

from camera.pruning.sparsity import sparsified, zero_share


def example(inputs: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return torch.randn(5, inputs, generator=chance), torch.rand(inputs, generator=chance) * 10


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.2, 2), (0.5, 6), (0.99, 11)])
def test_of_every_row_the_weights_of_least_metric_become_zero(sparsity: float, zeros: int) -> None:
    weight_OI, squares_I = example()
    found = sparsified(weight_OI, squares_I, sparsity)
    for row, sparse in zip(weight_OI, found, strict=True):
        metric = [
            abs(float(weight)) * float(square) ** 0.5 for weight, square in zip(row, squares_I, strict=True)
        ]
        least = sorted(range(12), key=metric.__getitem__)[:zeros]
        assert (sparse == 0).nonzero()[:, 0].tolist() == sorted(least)
        others = [index for index in range(12) if index not in least]
        assert torch.equal(sparse[others], row[others])
    assert zero_share(found) == pytest.approx(zeros / 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_given_weights_stay_as_they_are(dtype: torch.dtype) -> None:
    weight_OI, squares_I = example()
    given = weight_OI.to(dtype)
    kept = given.clone()
    found = sparsified(given, squares_I.double(), 0.5)
    assert torch.equal(given, kept)
    assert found.dtype == dtype
    assert zero_share(found) == 0.5


def test_more_rows_than_are_worked_on_at_once_are_all_made_sparse() -> None:
    found = sparsified(torch.ones(2500, 8), torch.arange(8.0), 0.25)
    assert torch.equal(found == 0, (torch.arange(8) < 2).expand(2500, 8))
