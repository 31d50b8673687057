"""A mixture of experts is measured layer by layer, each expert read once, as the whole model is; and in less memory."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.evaluation import text_model
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from camera.formats.convert import convert_to_gguf
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import TOKENS, tiny_moe_checkpoint

TYPES = ("qwen3_moe", "qwen2_moe", "deepseek_v2")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, TOKENS, (333,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", TYPES)
def test_perplexity_is_the_whole_models(tmp_path: Path, tokens: torch.Tensor, model_type: str) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, shards=2)
    whole, layers = (
        perplexity(folder, tokens, window=50, batch_size=4, device="cpu", layer_by_layer=layer_by_layer)
        for layer_by_layer in (False, True)
    )
    assert layers.nll_sum == pytest.approx(whole.nll_sum, rel=1e-5)
    assert (layers.tokens, layers.windows) == (whole.tokens, whole.windows)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2"])
def test_quantised_experts_are_measured_as_the_whole_model(
    tmp_path: Path, tokens: torch.Tensor, model_type: str
) -> None:
    source = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type))
    quantize_checkpoint(source, tmp_path / "packed", QuantizeOptions(type="q4_0"))
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    for place in (tmp_path / "packed", tmp_path / "model.gguf"):
        whole, layers = (
            perplexity(place, tokens, window=50, device="cpu", layer_by_layer=each) for each in (False, True)
        )
        assert layers.nll_sum == pytest.approx(whole.nll_sum, rel=1e-5)


def test_divergence_is_the_whole_models(tmp_path: Path, tokens: torch.Tensor) -> None:
    first, second = (tiny_moe_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    whole, layers = (
        divergence(first, second, tokens, window=50, batch_size=4, device="cpu", layer_by_layer=each)
        for each in (False, True)
    )
    assert layers.divergence == pytest.approx(whole.divergence, rel=1e-5)
    assert layers.top_1_agreement == whole.top_1_agreement


def test_progress_counts_every_window_of_every_layer(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "deepseek_v2")  # a dense layer, then two of experts
    seen: list[tuple[int, int]] = []
    perplexity(
        folder,
        tokens,
        window=30,
        batch_size=4,
        device="cpu",
        layer_by_layer=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (44, 44)  # eleven windows through three layers and the head
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_does_not_fit_is_counted_with_all_experts(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model")
    needed = Checkpoint.open(folder).needed.values()
    size = sum(4 * prod(info.shape) for info in needed)

    def fits(free: float) -> bool:
        monkeypatch.setattr(text_model, "free_memory_bytes", lambda device: free)
        return text_model.fits(Checkpoint.open(folder), torch.device("meta"), torch.float32)

    assert fits(2 * size + 2)
    assert not fits(2 * size - 2)


MEASURE = """
import resource, sys
import torch
from pathlib import Path
from camera.evaluation.perplexity import perplexity
from camera.loading import load_model
from tests.tiny import TOKENS, tiny_moe_checkpoint
folder, room, layer_by_layer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "layers"
torch.set_num_threads(1)
tokens = torch.randint(0, TOKENS, (257,), generator=torch.Generator().manual_seed(0))
warm = tiny_moe_checkpoint(folder.parent / f"warm-{sys.argv[3]}")
perplexity(warm, tokens, window=64, device="cpu", layer_by_layer=layer_by_layer)  # brings all libraries
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
held = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
print(perplexity(folder, tokens, window=64, device="cpu", layer_by_layer=layer_by_layer).nll_sum)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_checkpoint_larger_than_the_memory_it_is_allowed(tmp_path: Path) -> None:
    folder = _large(tmp_path / "model")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 1_000_000_000

    def measured(way: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MEASURE, str(folder), str(size // 4), way]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        layers, whole = measured("layers"), measured("whole")
        unlimited = perplexity(folder, _text(), window=64, device="cpu", layer_by_layer=True)
    finally:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    assert whole.returncode != 0, "the limit is none"
    assert layers.returncode == 0, layers.stderr[-2000:]
    assert float(layers.stdout) == pytest.approx(unlimited.nll_sum, rel=1e-6)


def _text() -> torch.Tensor:
    return torch.randint(0, TOKENS, (257,), generator=torch.Generator().manual_seed(0))


def _large(folder: Path) -> Path:
    """The tiny model with wide experts: 4 layers of 64 experts of 10,240 channels, in bfloat16."""
    layers, experts, width = 4, 64, 10_240
    tiny = Checkpoint.open(
        tiny_moe_checkpoint(folder, layers=layers, dtype=torch.bfloat16, num_experts=experts)
    )
    tensors = {name: tiny.read(name).clone() for name in tiny.tensors}
    # One matrix for all: small here, not in the file.
    gate_FH = (0.02 * torch.randn(width, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    down_HF = gate_FH.T.contiguous()
    for layer in range(layers):
        for block in tiny.blocks(layer):
            tensors |= {block.gate: gate_FH, block.up: gate_FH, block.down: down_HF}
    write_tensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": width}))
    return folder
