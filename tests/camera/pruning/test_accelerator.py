"""What is special where an accelerator computes: reading ahead, numbers that stay there, a thread that writes."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.digests import digest_folder
from camera.disk import DiskError
from camera.errors import CameraError
from camera.options import CaptureOptions, PruneOptions
from camera.pruning import importance, passes
from camera.pruning.model_writer import ModelWriter
from camera.pruning.prune_checkpoint import prune_checkpoint
from tests import fake_npu
from tests.tiny import tiny_checkpoint, tiny_moe_checkpoint

Prune = Callable[..., Path]
MODELS = {
    "dense": lambda folder: tiny_checkpoint(folder, "PanguEmbedded", shards=3),
    "experts": lambda folder: tiny_moe_checkpoint(folder, "qwen2_moe"),
}


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MODELS[request.param](tmp_path / "model")


@pytest.fixture
def prune(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Prune:
    """Prunes a model on a device into a new folder."""
    # The fake device's tensors are subclasses, and those of a thread cannot become parameters in inference mode.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())

    def run(
        source: Path, device: str, samples: int = 4, batch_size: int = 2, propagate: str = "sequential"
    ) -> Path:
        checkpoint, out = Checkpoint.open(source), tmp_path / f"{device}-{samples}-{batch_size}"
        if device == "npu":
            checkpoint.empty_model()  # transformers asks for operators of an NPU that it finds while it is imported
            request.getfixturevalue("npu")
        tokens_ST = torch.randint(3, 300, (samples, 32), generator=torch.Generator().manual_seed(0))
        capture = CaptureOptions(device=device, batch_size=batch_size, propagate=propagate)  # type: ignore[arg-type]
        prune_checkpoint(checkpoint, tokens_ST, out, capture, PruneOptions(ratio=0.3, multiple_of=8))
        return out

    return run


@pytest.mark.parametrize("propagate", ["sequential", "one-shot"])
def test_the_model_is_that_of_the_cpu(source: Path, prune: Prune, propagate: str) -> None:
    on_cpu = prune(source, "cpu", propagate=propagate)
    assert digest_folder(prune(source, "npu", propagate=propagate)) == digest_folder(on_cpu)


def test_it_is_so_where_hidden_states_do_not_fit_the_device(
    source: Path, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = prune(source, "cpu")
    monkeypatch.setattr(passes, "free_memory_bytes", lambda device: 0 if device.type == "npu" else 1 << 30)
    assert digest_folder(prune(source, "npu")) == digest_folder(on_cpu)


def test_how_often_the_host_waits_for_the_device_does_not_depend_on_the_number_of_samples(
    source: Path, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "FEW_TOKENS", 0)  # more tokens would be asked of more experts
    found = []
    for samples, batch_size in ((4, 2), (12, 2), (4, 1)):
        fake_npu.waits.clear()
        prune(source, "npu", samples, batch_size, "sequential")
        found.append(Counter(fake_npu.waits))
    assert found[0] == found[1] == found[2]
    layers = Checkpoint.open(source).layer_count
    blocks = sum(len(Checkpoint.open(source).blocks(layer)) for layer in range(layers))
    assert sum(found[0].values()) <= 10 + 8 * blocks


def test_a_weight_that_is_not_finite_is_named(source: Path, prune: Prune) -> None:
    checkpoint = Checkpoint.open(source)
    name = checkpoint.blocks(1)[0].up
    path = source / checkpoint.tensors[name].file
    tensors = {each: tensor.clone() for each, tensor in read_tensors(path).items()}
    tensors[name][1, 2] = torch.nan
    write_tensors(path, tensors)
    with pytest.raises(CameraError, match=f"{name} holds NaN or infinity; the checkpoint is damaged"):
        prune(source, "npu")


def test_what_goes_wrong_while_a_thread_writes_is_raised(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MODELS["dense"](tmp_path / "model")

    def full(self: ModelWriter, layer: int, stays: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ModelWriter, "write", full)
    with pytest.raises(DiskError, match="full"):
        prune(source, "npu")
    assert not (tmp_path / "npu-4-2").exists()
