from pathlib import Path

import pytest
import torch

from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.layerwise.statistics import (
    BlockStatistics,
    StatisticsSum,
    read_statistics,
    reduced,
    write_statistics,
)


def gathered(*batches: torch.Tensor) -> BlockStatistics:
    total = StatisticsSum(batches[0].shape[-1], torch.device("cpu"))
    for batch_BTF in batches:
        total.update(batch_BTF)
    return total.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_the_sum_of_squares_and_the_largest_magnitude(dtype: torch.dtype) -> None:
    act_BTF = (torch.randn(4, 300, 32) * 3).to(dtype)
    statistics = gathered(act_BTF)
    exact = act_BTF.double().flatten(0, 1)
    torch.testing.assert_close(statistics.sum_squares_F, exact.square().sum(0), rtol=1e-6, atol=0)
    assert torch.equal(statistics.max_abs_F.double(), exact.abs().amax(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_on_an_accelerator_a_sample_is_reduced_to_the_same_numbers(
    dtype: torch.dtype, weighted: bool
) -> None:
    act_NF = (torch.randn(300, 32) * 3).to(dtype)
    weight_N = torch.rand(300) - 0.5 if weighted else None
    largest_F, squares_F = reduced(act_NF, weight_N)
    exact = act_NF.double() if weight_N is None else (act_NF.float() * weight_N[:, None]).double()
    assert (largest_F.dtype, squares_F.dtype) == (torch.float32, torch.float32)
    assert torch.equal(largest_F.double(), exact.abs().amax(0))
    torch.testing.assert_close(squares_F.double(), exact.square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_on_an_accelerator_an_activation_that_is_not_finite_is_not_lost(bad: float) -> None:
    act_NF = torch.randn(64, 3)
    act_NF[17, 1] = bad
    largest_F, _ = reduced(act_NF, None)
    assert largest_F.isfinite().tolist() == [True, False, True]


def test_the_largest_magnitude_may_be_of_a_negative_activation() -> None:
    assert gathered(torch.tensor([[[1.0], [-4.0], [2.0]]])).max_abs_F.tolist() == [4.0]


def test_float16_activations_near_their_limit_do_not_overflow() -> None:
    statistics = gathered(torch.full((2, 2048, 3), 65_504.0, dtype=torch.float16))
    torch.testing.assert_close(
        statistics.sum_squares_F, torch.full((3,), 4096 * 65_504.0**2, dtype=torch.float64), rtol=1e-6, atol=0
    )
    statistics.check_finite("layer 0")


def test_a_small_channel_is_not_swamped_by_the_number_of_tokens() -> None:
    # 400,000 equal terms: a running float32 sum would be off by percents.
    act_BTF = torch.full((1, 4_000, 1), 0.1)
    statistics = gathered(*[act_BTF] * 100)
    exact = 400_000 * float(torch.tensor(0.1)) ** 2
    assert statistics.sum_squares_F.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_statistics_do_not_depend_on_how_samples_are_batched(batch: int) -> None:
    # Samples of very different size: their float64 sum is rounded, and so depends on its order.
    act_STF = torch.randn(7, 129, 70) * torch.tensor([1e-9, 3.0, 1e5, 1e-3, 7e4, 1e-6, 1e2])[:, None, None]
    whole, parts = gathered(act_STF), gathered(*act_STF.split(batch))
    assert torch.equal(whole.sum_squares_F, parts.sum_squares_F)
    assert torch.equal(whole.max_abs_F, parts.max_abs_F)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_not_finite_is_refused_with_its_layer(bad: float) -> None:
    act_BTF = torch.randn(2, 5, 4)
    act_BTF[1, 3, 2] = bad
    with pytest.raises(CameraError, match="decoder layer 17"):
        gathered(act_BTF).check_finite("decoder layer 17")


def test_statistics_read_back_as_they_were_written(tmp_path: Path) -> None:
    layers = [gathered(torch.randn(2, 5, 8)) for _ in range(3)]
    write_statistics(tmp_path / "s.safetensors", [{"": layer} for layer in layers])
    for before, after in zip(
        layers, [each[""] for each in read_statistics(tmp_path / "s.safetensors", 3)], strict=True
    ):
        assert torch.equal(before.sum_squares_F, after.sum_squares_F)
        assert torch.equal(before.max_abs_F, after.max_abs_F)


@pytest.mark.parametrize("layers", [2, 4])
def test_statistics_of_a_model_with_other_layers_are_refused(tmp_path: Path, layers: int) -> None:
    write_statistics(tmp_path / "s.safetensors", [{"": gathered(torch.randn(2, 5, 8))}] * layers)
    with pytest.raises(CameraError, match=rf"s\.safetensors has sum_squares of {layers} layers, the model 3"):
        read_statistics(tmp_path / "s.safetensors", 3)


def test_a_file_that_is_no_statistics_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "s.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(CameraError, match=r"s\.safetensors has sum_squares of 0 layers"):
        read_statistics(tmp_path / "s.safetensors", 1)
