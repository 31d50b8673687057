"""The Gram matrix of a layer's activations, of fitted and of held-back samples."""

from itertools import pairwise

import pytest
import torch

from camera.layerwise import gram as gram_module
from camera.layerwise.gram import LayerGram, Moments, held_back


@pytest.mark.parametrize("width", [5, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_product_of_the_activations_with_themselves(width: int, dtype: torch.dtype) -> None:
    act_STF = torch.randn(5, 7, width).to(dtype)
    gram = LayerGram(width, torch.device("cpu"))
    gram.update(act_STF[:2], [False, True])
    gram.update(act_STF[2:], [False, False, True])
    fit_FF, held_FF = gram.parts()
    for found, samples in ((fit_FF, [0, 2, 3]), (held_FF, [1, 4])):
        rows_TF = act_STF[samples].flatten(0, 1).double()
        torch.testing.assert_close(found.double(), rows_TF.T @ rows_TF, rtol=1e-5, atol=1e-5)
        assert torch.equal(found, found.T)
    assert (gram.fit_tokens, gram.held_tokens) == (21, 14)


def test_the_batch_size_changes_no_bit() -> None:
    act_STF = torch.randn(6, 9, 200)
    held = held_back(6)
    parts = []
    for size in (1, 4, 6):
        gram = LayerGram(200, torch.device("cpu"))
        for start in range(0, 6, size):
            gram.update(act_STF[start : start + size], held[start : start + size])
        parts.append(gram.parts())
    for fit_FF, held_FF in parts[1:]:
        assert torch.equal(fit_FF, parts[0][0])
        assert torch.equal(held_FF, parts[0][1])


@pytest.mark.parametrize(
    ("samples", "count"), [(1, 0), (2, 1), (3, 1), (8, 1), (12, 2), (16, 2), (128, 16), (1000, 125)]
)
def test_one_sample_of_eight_is_held_back_and_never_all(samples: int, count: int) -> None:
    held = held_back(samples)
    assert (len(held), sum(held)) == (samples, count)
    gaps = [index for index, chosen in enumerate(held) if chosen]
    assert all(abs((right - left) - samples / count) < 1 for left, right in pairwise(gaps))


def test_of_a_sum_of_gram_matrices_any_part_is_taken_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "_ROWS_AT_ONCE", 3)
    one, two = torch.randn(10, 10), torch.randn(10, 10)
    whole = one.double() + two
    moments, rows, columns = Moments(one, two), torch.tensor([0, 3, 4, 9]), torch.tensor([5, 1])
    assert torch.equal(moments.wide(), whole)
    assert torch.equal(moments.select(rows, columns), whole[rows][:, columns])
    assert moments.mean() == float(whole.diagonal().mean())
