import numpy as np
import pytest
import torch

from camera.errors import CameraError
from camera.formats import blocks
from camera.layerwise.observers import sum_of_products
from camera.options import BlockType
from camera.quantization.compensated_q4 import Q4Rounding, put_into, store_by_gptq
from camera.quantization.compensation import compensate
from camera.quantization.factor import factor_moments
from camera.quantization.q4 import pack
from camera.registry import BLOCK_FORMATS
from tests import fake_npu
from tests.camera.formats.in_memory import measure, quantize_by_gptq, quantize_by_search
from tests.camera.quantization.losses import correlated, error_by_squares, output_error

KINDS: list[BlockType] = ["q4_0", "q4_0_64"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(
    weight: torch.Tensor, kind: BlockType, moments: torch.Tensor, damping: float = 0.01
) -> np.ndarray:
    return quantize_by_gptq({"w": weight}, kind, factor_moments(moments.clone(), damping))["w"]


def stored(data: np.ndarray, kind: BlockType, width: int) -> torch.Tensor:
    return torch.from_numpy(blocks.dequantize(data, kind, width))


def naive(
    weight: torch.Tensor, moments: torch.Tensor, damping: float, found: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1 of the paper with no shortcut, given what earlier columns are stored as: the inverse is made anew for
    every column."""
    rest, codes = weight.double().clone(), torch.empty_like(weight)
    matrix = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    for column in range(rest.shape[1]):
        inverse = torch.linalg.inv(matrix[column:, column:])
        codes[:, column] = (rest[:, column] / scales[:, column]).round().clamp(-8, 7)
        error = (rest[:, column] - found[:, column]) / inverse[0, 0]
        rest[:, column + 1 :] -= error[:, None] * inverse[0, 1:]
    return codes


@pytest.mark.parametrize(("kind", "columns"), [("q4_0", 64), ("q4_0_64", 64), ("q4_0", 288)])
def test_codes_are_those_of_the_papers_algorithm_without_its_shortcuts(kind: BlockType, columns: int) -> None:
    weight, moments = normal(8, columns), correlated(columns)
    data, length = rounded(weight, kind, moments), BLOCK_FORMATS[kind].block_length
    scales = torch.from_numpy(data.reshape(8, -1, 2 + length // 2)[..., :2].copy()).view(torch.float16)
    scales = scales[..., 0].float().repeat_interleave(length, 1)
    found = stored(data, kind, columns)
    expected = naive(weight, moments, 0.01, found, scales)
    # Some fall the other way, as a block's scale is suited to its codes after they are chosen.
    assert (found / scales - expected).abs().max() < 1.01
    assert ((found / scales).round() == expected).double().mean() > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reported_is_what_is_lost(kind: BlockType) -> None:
    weight, moments = normal(48, 640), correlated(640, tokens=200)
    data = np.empty((48, BLOCK_FORMATS[kind].row_bytes(640)), np.uint8)

    factor = factor_moments(moments.clone(), 0.01)
    lost, numbers = store_by_gptq({"w": weight}, kind, {"w": put_into(data)}, factor, torch.float32)["w"]
    assert numbers is not None
    assert torch.equal(numbers, stored(data, kind, 640))
    assert lost.weighted_error == pytest.approx(output_error(weight, numbers, moments), rel=1e-3)
    expected = measure(weight, data, kind)
    assert lost.squares.power == pytest.approx(expected.power, rel=1e-5)
    assert lost.squares.noise == pytest.approx(expected.noise, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_layers_output_loses_far_less_than_with_either_search_or_rounding(
    kind: BlockType, seed: int
) -> None:
    weight, moments = normal(48, 256, seed=seed), correlated(256, seed=seed)
    losses = [
        output_error(weight, stored(data, kind, 256), moments)
        for data in (
            rounded(weight, kind, moments),
            quantize_by_search(weight, kind, moments.diagonal()),
            blocks.quantize(weight, kind),
        )
    ]
    assert losses[0] < 0.7 * min(losses[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_with_inputs_that_are_not_correlated_there_is_nothing_to_compensate(kind: BlockType) -> None:
    weight = normal(64, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    found, searched = (
        error_by_squares(weight, stored(data, kind, 128), importance)
        for data in (
            rounded(weight, kind, importance.diag().double(), 1e-9),
            quantize_by_search(weight, kind, importance),
        )
    )
    assert found == pytest.approx(searched, rel=0.01)


def test_matrices_that_share_an_input_are_rounded_as_each_alone_in_any_number_of_threads() -> None:
    factor = factor_moments(correlated(512), 0.01)
    matrices = {"q": normal(700, 512), "k": normal(200, 512, seed=1), "v": normal(40, 512, seed=2)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize_by_gptq(matrices, "q4_0", factor)
        torch.set_num_threads(3)
        three = quantize_by_gptq(matrices, "q4_0", factor)
    finally:
        torch.set_num_threads(before)
    for name, weight in matrices.items():
        np.testing.assert_array_equal(one[name], three[name])
        alone = quantize_by_gptq({name: weight}, "q4_0", factor)[name]
        assert (one[name] == alone).mean() > 0.99


def test_all_rows_at_once_as_on_an_accelerator_give_the_codes_of_chunks_of_rows() -> None:
    weight, factor = normal(1100, 256), factor_moments(correlated(256), 0.01)
    rounding = Q4Rounding(1100, 256, 32, torch.device("cpu"))
    compensate(weight, factor, [slice(at, at + 32) for at in range(0, 256, 32)], rounding)
    whole = pack(rounding.codes_IR.T, rounding.scales_BR.T, "q4_0")
    assert (quantize_by_gptq({"w": weight}, "q4_0", factor)["w"] == whole).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: BlockType) -> None:
    assert not stored(rounded(torch.zeros(3, 128), kind, correlated(128)), kind, 128).any()


def test_an_input_that_never_was_anything_leaves_its_column_rounded_to_the_nearest() -> None:
    moments = correlated(64)
    moments[5, :] = moments[:, 5] = 0
    weight = normal(4, 64)
    found = stored(rounded(weight, "q4_0", moments), "q4_0", 64)
    assert (found[:, 5] - weight[:, 5]).abs().max() < 0.35  # half a step of a block that reaches to about 3


def test_fewer_tokens_than_columns_are_enough() -> None:
    weight, moments = normal(8, 128), correlated(128, tokens=10)
    data, plain = rounded(weight, "q4_0", moments), blocks.quantize(weight, "q4_0")
    losses = [output_error(weight, stored(each, "q4_0", 128), moments) for each in (data, plain)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("value", [torch.nan, 1e6])
def test_what_no_block_can_hold_is_refused_by_its_name(value: float) -> None:
    weight = torch.full((2, 32), value)
    with pytest.raises(CameraError, match="o_proj holds"):
        quantize_by_gptq({"o_proj": weight}, "q4_0", factor_moments(correlated(32), 0.01))


def test_an_accelerator_rounds_as_the_cpu_and_is_waited_for_only_for_bytes_and_losses(npu: None) -> None:
    inputs = normal(300, 128) @ normal(128, 128, seed=1)
    weights = {"gate": normal(40, 128, seed=2), "up": normal(24, 128, seed=3)}
    found = []
    for device in (torch.device("cpu"), torch.device("npu", 0)):
        moments_II = sum_of_products([inputs.to(device)], 128, device)
        factor = factor_moments(moments_II, 0.01)
        fake_npu.waits.clear()
        found.append(quantize_by_gptq(weights, "q4_0", factor))
        assert len(fake_npu.waits) < 20
    for name in weights:
        assert (found[0][name] == found[1][name]).mean() > 0.98
