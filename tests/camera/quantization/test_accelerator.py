"""GPTQ where an accelerator computes: moments, factors and rounding are its work, and packed bytes come back."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.formats.quantized_model import QuantizedModel
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import TOKENS, tiny_checkpoint, tiny_moe_checkpoint

TOKENS_ST = torch.randint(3, TOKENS, (12, 48), generator=torch.Generator().manual_seed(0))
MODELS = {
    "dense": lambda folder: tiny_checkpoint(folder, "PanguEmbedded"),
    "experts": lambda folder: tiny_moe_checkpoint(folder, "qwen2_moe"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_layer_is_that_of_the_cpu(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fake device's tensors are subclasses, and those of a thread cannot become parameters in inference mode.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())
    source = Checkpoint.open(MODELS[kind](tmp_path / "source"))
    source.empty_model()  # transformers asks for operators of an NPU that it finds while it is imported
    for device in ("cpu", "npu"):
        if device == "npu":
            request.getfixturevalue("npu")
        others = {"overrides": {"*.layers.1.*": "q8_0"}, "output_type": "f16"}  # saves time
        options = QuantizeOptions(type="q4_0", method="gptq", device=device, batch_size=4, **others)  # type: ignore[arg-type]
        quantize_checkpoint(source, tmp_path / device, options, TOKENS_ST)
    cpu, npu = (QuantizedModel.open(tmp_path / device) for device in ("cpu", "npu"))
    for name in cpu.tensors:
        if name.startswith(
            "model.layers.0."
        ):  # a tie that falls the other way moves all that is rounded after it
            assert (cpu.packed(name) == npu.packed(name)).mean() > 0.9, name
