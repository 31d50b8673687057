"""A checkpoint that runs layer by layer is measured as the whole model is."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.evaluation import text_model
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MODEL_TYPES, TOKENS, tiny_checkpoint


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, TOKENS, (333,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_is_the_whole_models(
    tmp_path: Path, tokens: torch.Tensor, model_type: str, dtype: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type, tied=model_type == "qwen2", shards=2)
    whole, layers = (
        perplexity(
            folder, tokens, window=50, batch_size=4, dtype=dtype, device="cpu", layer_by_layer=layer_by_layer
        )
        for layer_by_layer in (False, True)
    )
    assert layers.nll_sum == pytest.approx(whole.nll_sum, rel=1e-6)
    assert (layers.tokens, layers.windows, layers.dtype) == (whole.tokens, whole.windows, whole.dtype)


def test_divergence_is_the_whole_models(tmp_path: Path, tokens: torch.Tensor) -> None:
    first, second = (tiny_checkpoint(tmp_path / str(seed), "PanguEmbedded", seed=seed) for seed in (0, 1))
    whole, layers = (
        divergence(
            first, second, tokens, window=50, batch_size=4, device="cpu", layer_by_layer=layer_by_layer
        )
        for layer_by_layer in (False, True)
    )
    assert layers.divergence == pytest.approx(whole.divergence, rel=1e-6)
    assert layers.top_1_agreement == whole.top_1_agreement


def test_hidden_states_that_take_too_much_memory_go_through_in_parts(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    at_once = perplexity(folder, tokens, window=30, batch_size=3, device="cpu", layer_by_layer=True)
    monkeypatch.setattr(text_model, "HIDDEN_SHARE", 0)
    seen: list[tuple[int, int]] = []
    in_parts = perplexity(
        folder,
        tokens,
        window=30,
        batch_size=3,
        device="cpu",
        layer_by_layer=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert in_parts.nll_sum == pytest.approx(at_once.nll_sum, rel=1e-9)
    assert seen[-1] == (33, 33)  # eleven windows through two layers and the head


def test_a_checkpoint_that_does_not_fit_runs_layer_by_layer(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    whole = perplexity(folder, tokens, window=50, device="cpu")
    monkeypatch.setattr(text_model, "WHOLE_SHARE", 0)
    monkeypatch.setattr(text_model, "load_model", None)
    assert perplexity(folder, tokens, window=50, device="cpu").nll_sum == pytest.approx(
        whole.nll_sum, rel=1e-6
    )


def test_the_layer_that_overflows_is_named(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for name in checkpoint.ffn_names(1):
        tensors[name] *= 1e20
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CameraError, match="window 0: decoder layer 1 computes NaN or infinity in float32"):
        perplexity(folder, tokens, window=100, device="cpu", layer_by_layer=True)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_quantised_folder_is_measured_as_the_whole_model(
    tmp_path: Path, tokens: torch.Tensor, dtype: str
) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16))
    quantize_checkpoint(source, tmp_path / "packed", QuantizeOptions(type="q4_0"))
    whole, layers = (
        perplexity(tmp_path / "packed", tokens, window=50, dtype=dtype, device="cpu", layer_by_layer=each)
        for each in (False, True)
    )
    assert layers.nll_sum == pytest.approx(whole.nll_sum, rel=1e-6)
    assert layers.dtype == whole.dtype
