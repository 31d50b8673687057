"""The scores that CAMERA's importance is held against."""

import torch
from quality_scores import Layer, flap, random_scores, wanda_sp, weight_norm

HIDDEN, WIDTH, TOKENS = 3, 5, 7


def layer(index: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(index)
    gate_FH, up_FH = torch.randn(2, WIDTH, HIDDEN, generator=generator)
    return Layer(
        index,
        gate_FH,
        up_FH,
        torch.randn(HIDDEN, WIDTH, generator=generator),
        torch.randn(TOKENS, WIDTH, generator=generator),
    )


def test_random_scores_depend_on_the_seed_and_the_layer_alone() -> None:
    first = random_scores(layer(0), 1)
    assert torch.equal(first, random_scores(layer(0), 1))
    assert not torch.equal(first, random_scores(layer(0), 2))
    assert not torch.equal(first, random_scores(layer(1), 1))


def test_weight_norm_is_of_all_three_parts_of_a_channel() -> None:
    one = layer()
    for channel, score in enumerate(weight_norm(one, 0).tolist()):
        parts = torch.cat([one.gate_FH[channel], one.up_FH[channel], one.down_HF[:, channel]])
        assert abs(score - float(parts.double().norm())) < 1e-6


def test_wanda_sp_is_the_mean_weight_times_the_norm_of_the_activation() -> None:
    one = layer()
    for channel, score in enumerate(wanda_sp(one, 0).tolist()):
        norm = sum(float(a) ** 2 for a in one.act_TF[:, channel]) ** 0.5
        mean = sum(abs(float(w)) * norm for w in one.down_HF[:, channel]) / HIDDEN
        assert abs(score - mean) < 1e-6


def test_flap_gives_nothing_for_a_channel_that_never_changes_however_large() -> None:
    one = layer()
    one.act_TF[:, 2] = 100.0
    scores = flap(one, 0)
    assert scores[2] == 0
    variance = sum((float(a) - float(one.act_TF[:, 0].mean())) ** 2 for a in one.act_TF[:, 0]) / (TOKENS - 1)
    assert abs(float(scores[0]) - variance * float(one.down_HF[:, 0].square().sum())) < 1e-5
