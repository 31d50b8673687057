"""Every family's experts are pruned as a plain masked whole model says, and what is saved is that model."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.folders import KEPT, SCORES, STATISTICS
from camera.pruning.plan import kept_width
from camera.pruning.prune_checkpoint import prune_checkpoint
from tests.camera.pruning.moe_reference import Reference
from tests.camera.pruning.moe_reference import prune as prune_naively
from tests.tiny import MOE_TYPES, tiny_moe_checkpoint

ALPHA = 0.6
PRUNE = PruneOptions(ratio=0.3, reduce_ratio=ALPHA, multiple_of=4)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny checkpoint of a family."""

    @cache
    def cached(model_type: str, **options: Any) -> Path:
        return tiny_moe_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **options)

    return cached


def prune_to(
    folder: Path, tokens_ST: torch.Tensor, out: Path, options: PruneOptions, **capture: Any
) -> dict[str, Any]:
    """Prune in one walk; the tensors that were kept of what was found out."""
    found: dict[str, Any] = {}

    def look(model: Path, pruned: Path) -> None:
        for name in (KEPT, SCORES, STATISTICS):
            found[name] = {key: value.clone() for key, value in read_tensors(pruned / name).items()}

    capturing = CaptureOptions(**{"device": "cpu", "batch_size": 2, "dtype": "float32", **capture})
    prune_checkpoint(Checkpoint.open(folder), tokens_ST, out, capturing, options, finish=look)
    return found


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="sdpa"
    )
    return model.eval(), info


@pytest.mark.parametrize(
    ("propagate", "share"),
    [
        ("one-shot", 0.0),
        ("sequential", 0.25),
        pytest.param("one-shot", 0.25, marks=pytest.mark.slow),
        pytest.param("sequential", 0.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_it_prunes_as_a_masked_whole_model_does(
    folder_of: Any, tokens: torch.Tensor, tmp_path: Path, model_type: str, propagate: str, share: float
) -> None:
    folder = folder_of(model_type)
    source = Checkpoint.open(folder)
    options = PRUNE.model_copy(update={"experts": share})
    found = prune_to(folder, tokens, tmp_path / "out", options, propagate=propagate)

    reference = Reference(folder)
    keys = set(source.family.width_keys(source.config))

    def count(block: Any, width: int) -> int:
        if block.width_key not in keys:
            return width
        return block.times * kept_width(width // block.times, 0.3, 4)

    groups = source.experts.groups(source.config)
    wanted = prune_naively(reference, tokens, ALPHA, count, propagate, 6 if share else None, groups)
    for layer, naive in enumerate(wanted):
        prefix = f"layers.{layer}."
        labels = {label: f"{prefix}{label}." if label else prefix for label in naive.kept}
        for label, start in labels.items():
            seen = naive.seen[label]
            assert found[STATISTICS][f"{start}tokens"] == seen.tokens
            if seen.tokens:
                torch.testing.assert_close(
                    found[STATISTICS][f"{start}sum_squares"],
                    seen.act_NF.square().sum(0),
                    rtol=1e-4,
                    atol=1e-9,
                )
                torch.testing.assert_close(
                    found[STATISTICS][f"{start}max_abs"].double(),
                    seen.act_NF.abs().amax(0),
                    rtol=1e-4,
                    atol=1e-6,
                )
            torch.testing.assert_close(
                found[SCORES][f"{start}importance"].tolist(), naive.scores[label], rtol=2e-4, atol=1e-9
            )
            assert found[KEPT][f"{start}kept"].tolist() == naive.kept[label]
        if naive.routed:
            assert found[STATISTICS][f"{prefix}routed_tokens"].tolist() == naive.routed
            if share:
                assert found[KEPT][f"{prefix}experts_kept"].tolist() == naive.experts

    model, info = load(tmp_path / "out")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference.logits(tokens), rtol=1e-4, atol=2e-5)
