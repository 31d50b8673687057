"""A refit must earn its place on tokens that it has not seen, and a layer that is refused is cut plainly."""

import logging

import pytest
import torch

from camera.layerwise.gram import LayerGram
from camera.layerwise.statistics import LayerStatistics
from camera.options import PruneOptions
from camera.pruning.importance import importance, kept_channels
from camera.pruning.surgery import Cut, Surgery, cut_layer, surgery_of

WIDTH, KEPT, HIDDEN = 24, 15, 8


def surgery(score: str = "obs", refit: bool = True) -> Surgery:
    options = PruneOptions(ratio=0.4, score=score, refit=refit, round=2)  # type: ignore[arg-type]
    found = surgery_of(WIDTH, KEPT, options)
    assert found is not None
    return found


def cut(
    act_STF: torch.Tensor,
    held: list[bool],
    asked: Surgery,
    dtype: torch.dtype = torch.float32,
) -> tuple[Cut, torch.Tensor, torch.Tensor]:
    """The cut, the down projection, and what plain CAMERA keeps."""
    down_HF = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    statistics, gram = LayerStatistics.zeros(WIDTH), LayerGram(WIDTH, torch.device("cpu"))
    statistics.update(act_STF)
    gram.update(act_STF, held)
    plain_K = kept_channels(importance(statistics, down_HF, asked.reduce_ratio), KEPT)
    return cut_layer(3, statistics, gram, down_HF, asked), down_HF, plain_K


def correlated(samples: int = 8, tokens: int = 40, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(samples, tokens, 12, generator=chance) @ torch.randn(12, WIDTH, generator=chance)


LAST = [False] * 7 + [True]


@pytest.mark.parametrize("score", ["energy", "obs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refit_that_helps_on_held_back_tokens_is_taken_and_uses_every_token(
    score: str, dtype: torch.dtype
) -> None:
    act_STF = correlated()
    found, down_HF, plain_K = cut(act_STF, LAST, surgery(score), dtype)
    assert found.matrices
    assert found.matrices["down"].dtype == dtype
    record = found.record
    assert (record.score, record.refitted, record.refused) == (score, True, None)
    assert (record.fit_tokens, record.held_tokens) == (280, 40)
    assert record.error is not None
    assert record.error_plain is not None
    assert record.error < record.error_plain / 2
    if score == "energy":
        assert torch.equal(found.kept_K, plain_K)
    all_TF = act_STF.flatten(0, 1).double()
    kept_TK, weight_HF = all_TF[:, found.kept_K], down_HF.double()
    penalty = 1e-3 * all_TF.square().sum(0).mean()
    system = kept_TK.T @ kept_TK + penalty * torch.eye(KEPT)
    wanted = kept_TK.T @ all_TF @ weight_HF.T + penalty * weight_HF[:, found.kept_K].T
    expected = torch.linalg.solve(system, wanted).T
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.matrices["down"].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", ["energy", "obs"])
def test_a_refit_that_does_not_help_on_held_back_tokens_is_refused_out_loud(
    score: str, caplog: pytest.LogCaptureFixture
) -> None:
    act_STF = correlated(seed=0)
    act_STF[7] = torch.randn(40, WIDTH)  # held back: text in which channels go together no more
    with caplog.at_level(logging.INFO):
        found, _, plain_K = cut(act_STF, LAST, surgery(score))
    assert not found.matrices
    assert torch.equal(found.kept_K, plain_K)
    record = found.record
    assert (record.score, record.refitted) == ("energy", False)
    assert record.error is not None
    assert record.error_plain is not None
    assert record.error > record.error_plain
    assert "on held-back tokens a refit loses" in str(record.refused)
    assert "layer 3 is pruned plainly" in caplog.text


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
def test_too_little_to_fit_or_to_check_is_refused(
    samples: int, tokens: int, held: list[bool] | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    act_STF = torch.zeros(samples, tokens, WIDTH) if held is None else correlated(samples, tokens)
    with caplog.at_level(logging.INFO):
        found, _, plain_K = cut(act_STF, held or LAST, surgery())
    assert not found.matrices
    assert torch.equal(found.kept_K, plain_K)
    assert why in str(found.record.refused)
    assert why in caplog.text


def test_obs_without_a_refit_chooses_and_leaves_the_weights() -> None:
    refitted, _, plain_K = cut(correlated(), LAST, surgery("obs", refit=True))
    chosen, _, _ = cut(correlated(), LAST, surgery("obs", refit=False))
    assert torch.equal(chosen.kept_K, refitted.kept_K)
    assert not torch.equal(chosen.kept_K, plain_K)
    assert not chosen.matrices
    assert (chosen.record.score, chosen.record.refitted, chosen.record.refused) == ("obs", False, None)


def test_there_is_no_surgery_where_plain_camera_is_all_there_is_to_do() -> None:
    assert surgery_of(WIDTH, KEPT, PruneOptions()) is None
    assert surgery_of(WIDTH, KEPT, PruneOptions(steps=3)) is None
    assert surgery_of(WIDTH, WIDTH, PruneOptions(refit=True)) is None
    found = surgery_of(640, 512, PruneOptions(score="obs"))
    assert found is not None
    assert (found.per_round, found.refit) == (10, False)
