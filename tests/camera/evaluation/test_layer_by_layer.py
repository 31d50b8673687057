"""A checkpoint that runs layer by layer is measured as the whole model is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.evaluation import head, text_model
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from camera.evaluation.text_model import open_text_model
from camera.formats.convert import convert_to_gguf
from camera.options import BlockType, QuantizeOptions
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


@pytest.mark.parametrize("limit", ["HIDDEN_SHARE", "HIDDEN_BYTES", "ACTIVATION_BYTES"])
def test_what_takes_too_much_memory_at_once_goes_through_in_parts(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    at_once = perplexity(folder, tokens, window=30, batch_size=3, device="cpu", layer_by_layer=True)
    monkeypatch.setattr(text_model, limit, 0)
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
    assert in_parts.nll_sum == pytest.approx(at_once.nll_sum, rel=1e-6)
    assert seen[-1] == (33, 33)  # eleven windows through two layers and the head


@pytest.mark.parametrize("step", [7, 100])
def test_the_head_is_read_in_slices_of_the_vocabulary(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    first, second = (tiny_checkpoint(tmp_path / str(seed), "PanguEmbedded", seed=seed) for seed in (0, 1))
    whole = (
        divergence(first, second, tokens, window=50, device="cpu"),
        perplexity(first, tokens, window=50, device="cpu"),
    )
    monkeypatch.setattr(head, "SLICE_BYTES", step * 64 * 4)
    seen: list[tuple[int, int]] = []
    sliced = (
        divergence(first, second, tokens, window=50, device="cpu"),
        perplexity(
            first, tokens, window=50, device="cpu", progress=lambda done, total: seen.append((done, total))
        ),
    )
    assert sliced[0].divergence == pytest.approx(whole[0].divergence, rel=1e-5)
    assert sliced[0].top_1_agreement == whole[0].top_1_agreement
    assert sliced[1].nll_sum == pytest.approx(whole[1].nll_sum, rel=1e-6)
    assert seen[-1] == (18, 18)  # six windows through two layers and the head
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_host_has_layers_in_memory_only_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    assert open_text_model(folder, device="cpu").layers == 2
    assert open_text_model(folder, device="cpu", layer_by_layer=False).layers == 0


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
@pytest.mark.parametrize(
    ("model_type", "type"), [*((name, "q4_0") for name in MODEL_TYPES), ("llama", "bf16"), ("qwen2", "q8_0")]
)
def test_quantised_folders_and_gguf_files_are_measured_as_the_whole_model(
    tmp_path: Path, tokens: torch.Tensor, model_type: str, type: BlockType, dtype: str
) -> None:
    tied = model_type == "qwen2"
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "model", model_type, dtype=torch.bfloat16, tied=tied))
    quantize_checkpoint(source, tmp_path / "packed", QuantizeOptions(type=type))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    for place in (tmp_path / "packed", tmp_path / "model.gguf"):
        whole, layers = (
            perplexity(place, tokens, window=50, dtype=dtype, device="cpu", layer_by_layer=each)
            for each in (False, True)
        )
        assert layers.nll_sum == pytest.approx(whole.nll_sum, rel=1e-6)
        assert layers.dtype == whole.dtype


MEASURE = """
import sys
import torch
from camera.devices import peak_memory_bytes
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from tests.tiny import TOKENS, tiny_checkpoint
cpu, tokens = torch.device("cpu"), torch.arange(128) % TOKENS
torch.set_num_threads(1)
small, *places = sys.argv[1:]
divergence(small, small, tokens, window=64, device="cpu")  # brings all libraries
before = peak_memory_bytes(cpu)
for place in places:
    perplexity(place, tokens, window=64, device="cpu")
    divergence(places[0], place, tokens, window=64, device="cpu")
print(peak_memory_bytes(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is of Linux")
def test_a_head_larger_than_the_memory_it_is_allowed(tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small")
    sizes = {"hidden": 512, "vocab": 100_352, "layers": 1, "ffn": 64, "tied": True}
    folder = tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]
    quantize_checkpoint(Checkpoint.open(folder), tmp_path / "packed", QuantizeOptions(type="bf16"))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    places = [str(place) for place in (small, folder, tmp_path / "model.gguf")]
    command = [sys.executable, "-c", MEASURE, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head_bytes = 100_352 * 512 * 2
    assert int(done.stdout) < 3 * head_bytes  # whole heads and logits took five
