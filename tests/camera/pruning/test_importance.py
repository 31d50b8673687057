import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camera.errors import CameraError
from camera.layerwise.statistics import BlockStatistics, StatisticsSum
from camera.pruning.importance import importance, kept_channels
from camera.pruning.plan import kept_width
from tests.camera.pruning import naive


def statistics_of(act_BTF: torch.Tensor) -> BlockStatistics:
    total = StatisticsSum(act_BTF.shape[-1], torch.device("cpu"))
    total.update(act_BTF)
    return total.read()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.95, 1.0])
def test_importance_is_the_formula_of_the_paper(alpha: float) -> None:
    act_BTF = torch.randn(3, 20, 16)
    down_HF = torch.randn(8, 16)
    statistics = statistics_of(act_BTF)
    found = importance(statistics, down_HF, alpha)
    assert found.dtype == torch.float64
    expected = naive.scores(act_BTF.double().flatten(0, 1), down_HF, alpha)
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-6, atol=0)


def test_alpha_decides_between_a_steady_channel_and_one_with_a_single_peak() -> None:
    act_BTF = torch.full((1, 100, 2), 0.0)
    act_BTF[:, :, 0] = 1.0  # energy 100, peak 1
    act_BTF[:, 50, 1] = 5.0  # energy 25, peak 25
    statistics = statistics_of(act_BTF)
    by_energy = importance(statistics, torch.ones(4, 2), 0.0)
    by_peak = importance(statistics, torch.ones(4, 2), 1.0)
    assert by_energy.tolist() == [400.0, 100.0]
    assert by_peak.tolist() == [4.0, 100.0]


def test_importance_of_half_precision_weights_is_computed_in_double() -> None:
    down_HF = torch.full((4096, 4), 200.0, dtype=torch.float16)  # the squares alone exceed float16
    statistics = BlockStatistics(torch.ones(4, dtype=torch.float64), torch.ones(4))
    assert importance(statistics, down_HF, 0.5).tolist() == [4096 * 200.0**2] * 4


@given(
    width=st.integers(1, 20_000),
    ratio=st.floats(0, 1, exclude_min=True, exclude_max=True),
    multiple_of=st.integers(1, 512),
)
def test_kept_width_is_the_wanted_width_rounded_up_or_a_refusal(
    width: int, ratio: float, multiple_of: int
) -> None:
    wanted = width - int(width * ratio)
    try:
        kept = kept_width(width, ratio, multiple_of)
    except CameraError:
        # Refused only where no multiple lies between what was wanted and the whole width.
        assert -(-wanted // multiple_of) * multiple_of >= width
        return
    assert kept % multiple_of == 0
    assert 1 <= wanted <= kept < width
    assert kept - wanted < multiple_of


@given(width=st.integers(1, 20_000), multiple_of=st.integers(1, 512))
def test_ratio_zero_keeps_every_channel_whatever_the_rounding(width: int, multiple_of: int) -> None:
    assert kept_width(width, 0.0, multiple_of) == width


@pytest.mark.parametrize(
    ("width", "ratio", "multiple_of", "kept"),
    [
        (12_800, 0.2, 64, 10_240),  # openPangu-Embedded 7B
        (6_144, 0.2, 64, 4_928),  # 4916 rounded up
        (172, 0.2, 4, 140),  # 138 rounded up
        (172, 0.999, 4, 4),
        (100, 0.29, 1, 72),  # int(100 * 0.29) is 28: the reference's floor of a float product, kept
    ],
)
def test_kept_width_of_known_models(width: int, ratio: float, multiple_of: int, kept: int) -> None:
    assert kept_width(width, ratio, multiple_of) == kept


@pytest.mark.parametrize(
    ("width", "ratio", "multiple_of"), [(172, 0.2, 64), (40, 0.5, 64), (192, 1e-9, 1), (1, 0.9, 1)]
)
def test_a_plan_that_prunes_nothing_is_refused_and_says_what_to_change(
    width: int, ratio: float, multiple_of: int
) -> None:
    with pytest.raises(
        CameraError, match=rf"prune.ratio {ratio} of {width} .* nothing would be pruned.*prune.multiple_of"
    ):
        kept_width(width, ratio, multiple_of)


def test_kept_channels_come_in_their_original_order() -> None:
    assert kept_channels(torch.tensor([1.0, 9.0, 3.0, 7.0, 5.0]).double(), 3).tolist() == [1, 3, 4]


def test_of_equally_important_channels_the_first_stay() -> None:
    assert kept_channels(torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0]).double(), 3).tolist() == [0, 1, 4]
    assert kept_channels(torch.zeros(1000).double(), 300).tolist() == list(range(300))


@given(
    values=st.lists(st.floats(0, 1e300).map(lambda value: float(f"{value:.1e}")), min_size=1, max_size=60),
    data=st.data(),
)
def test_no_channel_that_goes_is_more_important_than_one_that_stays(
    values: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(values)))
    kept = kept_channels(torch.tensor(values, dtype=torch.float64), count).tolist()
    assert kept == naive.best(values, count)
