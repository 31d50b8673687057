"""A refit must earn its place on tokens that it has not seen; a layer whose method is rejected falls back to CAMERA's choice."""

import logging
from dataclasses import replace

import pytest
import torch

from camera.layerwise.gram import LayerGram
from camera.layerwise.statistics import StatisticsSum
from camera.pruning.importance import importance, kept_channels
from camera.pruning.methods import Choice, ObservedBlock
from camera.pruning.plan import Cut, PrunePlan
from camera.registry import PRUNING_METHODS

WIDTH, KEPT, HIDDEN = 24, 15, 8
PLAN = PrunePlan(
    cuts=(Cut("width", WIDTH, KEPT),),
    experts=0,
    experts_kept=0,
    scope="expert",
    method="obs",
    reduce_ratio=0.95,
    dampings=(1e-3,),
    round=2,
    sparsity=0.0,
    mode="physical",
    sequential=True,
)
LAST = [False] * 7 + [True]


def decided(
    act_STF: torch.Tensor, held: list[bool], method: str, dtype: torch.dtype = torch.float32
) -> tuple[Choice, torch.Tensor, torch.Tensor]:
    """The choice, the down projection, and what CAMERA keeps."""
    down_HF = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    total, gram = StatisticsSum(WIDTH, torch.device("cpu")), LayerGram(WIDTH, torch.device("cpu"))
    total.update(act_STF)
    statistics = total.read()
    gram.update(act_STF, held)
    scores_F = importance(statistics, down_HF, PLAN.reduce_ratio)
    layer = ObservedBlock("layer 3", KEPT, statistics, scores_F, down_HF, gram)
    choice = PRUNING_METHODS[method].decide(layer, replace(PLAN, method=method))
    return choice, down_HF, kept_channels(scores_F, KEPT)


def correlated(samples: int = 8, tokens: int = 40, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(samples, tokens, 12, generator=chance) @ torch.randn(12, WIDTH, generator=chance)


@pytest.mark.parametrize("method", ["refit", "obs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refit_that_helps_on_held_back_tokens_is_taken_and_uses_every_token(
    method: str, dtype: torch.dtype
) -> None:
    act_STF = correlated()
    found, down_HF, camera_K = decided(act_STF, LAST, method, dtype)
    assert found.down_HK is not None
    assert found.down_HK.dtype == dtype
    record = found.record
    assert record is not None
    assert (record.method, record.refitted, record.fallback) == (method, True, None)
    assert (record.fit_tokens, record.held_tokens) == (280, 40)
    assert record.error is not None
    assert record.error_camera is not None
    assert record.error < record.error_camera / 2
    assert torch.equal(found.kept_K, camera_K) == (method == "refit")
    all_TF = act_STF.flatten(0, 1).double()
    kept_TK, weight_HF = all_TF[:, found.kept_K], down_HF.double()
    penalty = 1e-3 * all_TF.square().sum(0).mean()
    system = kept_TK.T @ kept_TK + penalty * torch.eye(KEPT)
    wanted = kept_TK.T @ all_TF @ weight_HF.T + penalty * weight_HF[:, found.kept_K].T
    expected = torch.linalg.solve(system, wanted).T
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.down_HK.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["refit", "obs"])
def test_a_refit_that_does_not_help_on_held_back_tokens_falls_back_and_says_so(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    act_STF = correlated(seed=0)
    act_STF[7] = torch.randn(40, WIDTH)  # held back: text in which channels go together no more
    with caplog.at_level(logging.INFO):
        found, _, camera_K = decided(act_STF, LAST, method)
    assert found.down_HK is None
    assert torch.equal(found.kept_K, camera_K)
    record = found.record
    assert record is not None
    assert (record.method, record.refitted) == ("camera", False)
    assert record.error is not None
    assert record.error_camera is not None
    assert record.error > record.error_camera
    assert "on held-back tokens a refit loses" in str(record.fallback)
    assert f"layer 3: {method} rejected, fell back to CAMERA's choice" in caplog.text


@pytest.mark.parametrize(
    ("samples", "tokens", "held", "why"),
    [
        (
            2,
            60,
            [False, True],
            "60 calibration tokens to fit are fewer than 4 for each of the 24 FFN channels",
        ),
        (1, 400, [False], "a single calibration sample"),
        (8, 40, None, "cannot be inverted"),
    ],
)
def test_too_little_to_fit_or_to_judge_falls_back(
    samples: int, tokens: int, held: list[bool] | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    act_STF = torch.zeros(samples, tokens, WIDTH) if held is None else correlated(samples, tokens)
    with caplog.at_level(logging.INFO):
        found, _, camera_K = decided(act_STF, held or LAST, "obs")
    assert found.down_HK is None
    assert torch.equal(found.kept_K, camera_K)
    assert found.record is not None
    assert why in str(found.record.fallback)
    assert why in caplog.text


@pytest.mark.parametrize(
    ("change", "gram", "in_capture"),
    [
        ({}, True, True),
        ({"method": "camera"}, False, True),
        ({"method": "camera", "sequential": False}, False, False),
        ({"method": "camera", "sequential": False, "sparsity": 0.5}, False, True),
        ({"method": "refit", "sequential": False}, True, True),
        ({"cuts": (Cut("width", WIDTH, WIDTH),), "sequential": False}, False, False),
    ],
)
def test_a_plan_asks_for_no_more_than_its_decision_needs(
    change: dict[str, object], gram: bool, in_capture: bool
) -> None:
    plan = replace(PLAN, **change)  # type: ignore[arg-type]
    assert (plan.needs_gram, plan.decides_in_capture) == (gram, in_capture)
