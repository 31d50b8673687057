from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.evaluation import head
from camera.evaluation.divergence import divergence
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint


def load(folder: Path) -> PreTrainedModel:
    return Checkpoint.open(folder).load_model(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "PanguEmbedded")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return load(folder)


@pytest.fixture(scope="module")
def other(folder: Path) -> PreTrainedModel:
    """The reference, a little off."""
    model = load(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, TOKENS, (333,), generator=torch.Generator().manual_seed(0))


def by_hand(
    reference: PreTrainedModel, model: PreTrainedModel, windows_WT: torch.Tensor
) -> tuple[float, float]:
    """Mean divergence and agreement over every position but the last of each window, from transformers' logits."""
    with torch.no_grad():
        p, q = (each(input_ids=windows_WT).logits[:, :-1].double().softmax(-1) for each in (reference, model))
    mean = (p * (p / q).log()).sum(-1).mean()
    return float(mean), float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_is_the_mean_over_all_predictions_of_each_window(
    tmp_path: Path, tokens: torch.Tensor, model_type: str
) -> None:
    tied = model_type == "qwen2"
    first, second = (
        tiny_checkpoint(tmp_path / str(seed), model_type, tied=tied, seed=seed) for seed in (0, 1)
    )
    result = divergence(first, second, tokens, window=100, device="cpu")
    expected, agreement = by_hand(load(first), load(second), tokens[:300].view(3, 100))
    assert result.divergence == pytest.approx(expected, rel=1e-4)
    assert result.top_1_agreement == pytest.approx(agreement)
    assert (result.windows, result.window, result.tokens) == (3, 100, 3 * 99)


def test_a_model_does_not_differ_from_itself(reference: PreTrainedModel, tokens: torch.Tensor) -> None:
    result = divergence(reference, reference, tokens, window=64)
    assert result.divergence == pytest.approx(0, abs=1e-9)
    assert result.top_1_agreement == 1


def test_the_reference_is_the_first(
    reference: PreTrainedModel, other: PreTrainedModel, tokens: torch.Tensor
) -> None:
    forth = divergence(reference, other, tokens, window=64).divergence
    back = divergence(other, reference, tokens, window=64).divergence
    assert forth > 0
    assert forth != pytest.approx(back, rel=1e-4)


def test_batches_and_pieces_of_logits_do_not_change_it(
    reference: PreTrainedModel, other: PreTrainedModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = divergence(reference, other, tokens, window=32, batch_size=100)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7 * TOKENS)
    pieces = divergence(reference, other, tokens, window=32, batch_size=3)
    assert pieces.divergence == pytest.approx(whole.divergence, rel=1e-5)
    assert pieces.top_1_agreement == whole.top_1_agreement


def test_a_quantised_folder_differs_more_the_fewer_bits_it_has(
    tmp_path: Path, folder: Path, tokens: torch.Tensor
) -> None:
    found = []
    for kind in ("q8_0", "q4_0"):
        quantize_checkpoint(Checkpoint.open(folder), tmp_path / kind, QuantizeOptions(type=kind))  # type: ignore[arg-type]
        found.append(divergence(folder, tmp_path / kind, tokens, window=100, device="cpu").divergence)
    assert 0 < found[0] < 0.1 * found[1]


def test_models_of_other_vocabularies_are_refused(
    tmp_path: Path, reference: PreTrainedModel, tokens: torch.Tensor
) -> None:
    wider = tiny_checkpoint(tmp_path / "wider", vocab=TOKENS + 64)
    with pytest.raises(CameraError, match=f"vocabularies of {TOKENS} and {TOKENS + 64}"):
        divergence(reference, wider, tokens, device="cpu")


def test_tokens_of_another_vocabulary_are_refused(reference: PreTrainedModel) -> None:
    with pytest.raises(CameraError, match=f"reach from 0 to {TOKENS} and the model has {TOKENS}"):
        divergence(reference, reference, torch.arange(TOKENS + 1))


def test_nan_is_refused_with_its_windows(
    folder: Path, reference: PreTrainedModel, tokens: torch.Tensor
) -> None:
    damaged = load(folder)
    damaged.get_decoder().layers[1].mlp.down_proj.weight.data[5, 7] = torch.nan
    with pytest.raises(CameraError, match="windows 0 to 2: a model computes NaN"):
        divergence(reference, damaged, tokens, window=100)


def test_progress_counts_windows(reference: PreTrainedModel, tokens: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    divergence(
        reference,
        reference,
        tokens,
        window=50,
        max_windows=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 5), (5, 5)]


def test_the_result_says_what_computed_it(folder: Path, tokens: torch.Tensor) -> None:
    result = asdict(divergence(folder, folder, tokens, window=100, dtype="bfloat16", device="cpu"))
    assert (result["dtype"], result["reference_dtype"], result["device"]) == ("bfloat16", "bfloat16", "cpu")
