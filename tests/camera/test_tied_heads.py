"""tie_word_embeddings beside a stored output head: every reader means the model that transformers 5 loads."""

import json
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.checkpoints.weights import SINGLE_NAME
from camera.engines.torch_engine import TorchEngine
from camera.evaluation.perplexity import perplexity
from camera.formats.convert import convert_to_gguf
from camera.loading import load_model
from camera.options import QuantizeOptions
from camera.pruning.model_writer import ModelWriter
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import TOKENS, tiny_checkpoint

IDS = torch.randint(0, TOKENS, (1, 24), generator=torch.Generator().manual_seed(3))


def with_head(folder: Path, added: float) -> Path:
    """A checkpoint whose config says tied, and that holds the embedding plus some noise as its output head."""
    tiny_checkpoint(folder, "qwen2", tied=True)
    tensors = {name: value.clone() for name, value in read_tensors(folder / SINGLE_NAME).items()}
    embedding = tensors["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    write_tensors(folder / SINGLE_NAME, {**tensors, "lm_head.weight": embedding + added * noise})
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(tmp_path_factory.mktemp("apart") / "model", 0.1)


@pytest.fixture(scope="module")
def packed(apart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    quantize_checkpoint(Checkpoint.open(apart), out / "packed", QuantizeOptions(type="f32"))
    convert_to_gguf(out / "packed", out / "model.gguf", name="apart")
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits[0].float()
    return found


def reference(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def test_a_head_that_was_trained_apart_is_used_by_all_who_load_the_model(apart: Path, packed: Path) -> None:
    meant = logits(reference(apart))
    assert not Checkpoint.open(apart).tied
    for loaded in (Checkpoint.open(apart).load_model(), load_model(apart, device="cpu")):
        torch.testing.assert_close(logits(loaded), meant)
    for stored in ("packed", "model.gguf"):
        torch.testing.assert_close(logits(load_model(packed / stored, device="cpu")), meant)
        engine = TorchEngine(packed / stored, torch.device("cpu"), capacity=32)
        torch.testing.assert_close(
            engine.prefill(IDS[0].tolist()).float().flatten(), meant[-1], atol=0.05, rtol=0.05
        )


def test_its_perplexity_is_that_of_transformers(apart: Path, packed: Path) -> None:
    meant = float(torch.nn.functional.cross_entropy(logits(reference(apart))[:-1], IDS[0, 1:]).exp())
    for place in (apart, packed / "packed", packed / "model.gguf"):
        assert perplexity(place, IDS[0], window=24, device="cpu").perplexity == pytest.approx(meant, rel=1e-4)


def test_what_is_written_says_that_it_is_not_tied(apart: Path, packed: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(apart)
    writer = ModelWriter(source, tmp_path, "physical", {"max_window_layers": 1}, changed=False)
    writer.write_rest()
    writer.finish()
    for folder in (tmp_path, packed / "packed"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((apart / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_stored_head_that_equals_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "model", 0.0)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    assert checkpoint.tied
    assert checkpoint.head == checkpoint.embedding
    report = quantize_checkpoint(checkpoint, tmp_path / "packed", QuantizeOptions(type="q8_0"))
    assert "lm_head.weight" not in {record.name for record in report.tensors}
