"""Values of some channels, by a quicker way than indexing."""

import pytest
import torch

from camera.layerwise.statistics import gather_channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
def test_the_bits_are_those_of_the_channels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    values[..., 3] = torch.nan
    kept_K = torch.tensor([0, 3, 6])
    found = gather_channels(values, kept_K)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), values[..., kept_K].contiguous().view(torch.uint8))


def test_a_transposed_matrix_and_no_channel_at_all_are_fine() -> None:
    matrix = torch.randn(6, 4).T
    assert torch.equal(gather_channels(matrix, torch.tensor([1, 5])), matrix[:, [1, 5]])
    assert gather_channels(matrix, torch.tensor([], dtype=torch.int64)).shape == (4, 0)
