"""Perplexity and divergence in one pass are those of camera.evaluation."""

from math import exp
from pathlib import Path

import pytest
import torch
from quality_measure import Reference

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from tests.tiny import TOKENS, tiny_checkpoint


def test_both_are_those_of_the_evaluation(tmp_path: Path) -> None:
    dense = Checkpoint.open(tiny_checkpoint(tmp_path / "dense", seed=1)).load_model()
    other = Checkpoint.open(tiny_checkpoint(tmp_path / "other", seed=2)).load_model()
    tokens = torch.randint(TOKENS, (11 * 16,), generator=torch.Generator().manual_seed(0))
    reference = Reference(dense, tokens.view(11, 16))
    measured = reference.measure(other)
    assert exp(measured.loss) == pytest.approx(perplexity(other, tokens, window=16).perplexity, rel=1e-5)
    assert measured.divergence == pytest.approx(
        divergence(dense, other, tokens, window=16).divergence, rel=1e-4
    )


def test_the_dense_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    dense = Checkpoint.open(tiny_checkpoint(tmp_path / "dense")).load_model()
    reference = Reference(dense, torch.arange(64).view(2, 32))
    measured = reference.measure(dense)
    assert measured.loss == reference.loss
    assert measured.divergence == 0


def test_a_model_that_computes_nan_is_refused(tmp_path: Path) -> None:
    dense = Checkpoint.open(tiny_checkpoint(tmp_path / "dense")).load_model()
    reference = Reference(dense, torch.arange(64).view(2, 32))
    torch.nn.init.constant_(dense.get_decoder().layers[0].mlp.down_proj.weight, torch.nan)
    with pytest.raises(CameraError, match="NaN"):
        reference.measure(dense)
