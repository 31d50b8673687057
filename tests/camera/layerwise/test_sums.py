import pytest
import torch

from camera.layerwise.sums import ExactSum, energies, sample_squares

CPU = torch.device("cpu")


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "two-float32"])
def test_a_sum_is_as_exact_as_float64_whether_the_device_has_it_or_not(wide: bool) -> None:
    terms = torch.randn(3000, 8) * torch.tensor([1e-6, 1.0, 1e5, 1e9]).repeat(2)
    total = ExactSum((8,), CPU, wide=wide)
    for term in terms[:1000]:
        total.add(term)
    total.add(terms[1000:])
    scale = terms.double().abs().sum(0)
    assert ((total.read() - terms.double().sum(0)).abs() <= 1e-13 * scale).all()


@pytest.mark.parametrize("wide", [True, False])
def test_a_row_of_a_sum_is_added_to_by_itself(wide: bool) -> None:
    total = ExactSum((3,), CPU, wide=wide)
    total[1].add(torch.tensor([0.5, 2.0]))
    total[2].add(torch.tensor(1.0))
    assert total.read().tolist() == [0.0, 2.5, 1.0]


def test_what_was_read_stays_when_more_is_added() -> None:
    total = ExactSum((), CPU)
    before = total.read()
    total.add(torch.tensor(3.0))
    assert (float(before), float(total.read())) == (0.0, 3.0)


def test_terms_are_those_of_samples() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 4.0]])
    assert energies(rows, [1, 0, 2]).tolist() == [5.0, 0.0, 25.0]
    assert energies(rows[:0], []).tolist() == []
    assert sample_squares(rows).tolist() == [[10.0, 20.0]]
