import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from camera.checkpoints.checkpoint import Checkpoint
from camera.engines.parts.int4_linear import CpuInt4Linear, Int4Parts
from camera.engines.parts.int4_npu import NpuInt4Linear
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError
from camera.formats.quantized_model import QuantizedModel
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MODEL_TYPES, tiny_checkpoint, tiny_moe_checkpoint

CPU = torch.device("cpu")
PROMPT = [1, 5, 9, 33, 120, 7]


def quantised(
    folder: Path, model_type: str, kind: BlockType, *, vocab: int = 384, tied: bool = False
) -> Path:
    source = tiny_checkpoint(folder / "model", model_type, hidden=128, vocab=vocab, tied=tied)
    quantize_checkpoint(Checkpoint.open(source), folder / "packed", QuantizeOptions(type=kind, device="cpu"))
    return folder / "packed"


def dequantised(folder: Path) -> PreTrainedModel:
    model = Checkpoint.open(folder.parent / "model").load_model(torch.float32)
    weights = QuantizedModel.open(folder).state_dict()
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float().cpu() - exact).norm() / exact.norm())


def test_a_new_prompt_forgets_the_old_one(tmp_path: Path) -> None:
    engine = TorchEngine(tiny_checkpoint(tmp_path / "model"), CPU, capacity=64)
    first = engine.prefill(PROMPT).clone()
    engine.decode(40)
    assert torch.equal(engine.prefill(PROMPT), first)


def test_a_prompt_does_not_copy_the_heads_matrix(tmp_path: Path) -> None:
    engine = TorchEngine(tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16), CPU, capacity=64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        engine.prefill(PROMPT)
    head = list(engine.model.lm_head.weight.shape)
    copies = [event.input_shapes for event in seen.events() if event.name == "aten::copy_"]
    assert copies
    assert not [shapes for shapes in copies if sorted(shapes[0])[-2:] == sorted(head)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["q4_0", "q4_0_64"])
def test_4_bit_logits_equal_the_dequantised_models_within_bfloat16(
    tmp_path: Path, model_type: str, kind: BlockType
) -> None:
    folder = quantised(tmp_path, model_type, kind, tied=model_type == "qwen2")
    engine = TorchEngine(folder, CPU, capacity=16)
    assert sum(isinstance(module, CpuInt4Linear) for module in engine.model.modules()) == 2 * 4 + 1
    reference = dequantised(folder)
    with torch.no_grad():
        exact = reference(torch.tensor([PROMPT])).logits[0, -1]
        rounded = reference.to(torch.bfloat16)(torch.tensor([PROMPT])).logits[0, -1]
    # As far off as the same model is in bfloat16: the 4-bit kernels add only the rounding of the scales.
    assert relative(engine.prefill(PROMPT), exact) < max(2 * relative(rounded, exact), 0.01)


def test_a_long_prompt_gives_the_same_logits_as_one_token_after_another(tmp_path: Path) -> None:
    engine = TorchEngine(quantised(tmp_path, "llama", "q4_0_64"), CPU, capacity=128)
    prompt = [3 + index % 300 for index in range(100)]  # longer than the 4-bit kernel takes
    at_once = engine.prefill(prompt).float().clone()
    engine.prefill(prompt[:1])
    for token in prompt[1:]:
        with torch.inference_mode():
            stepwise = engine._forward(torch.tensor([[token]]))[0, -1]
    assert relative(stepwise, at_once) < 0.05


def test_on_an_npu_the_head_that_is_too_large_is_4_bit_in_parts(
    tmp_path: Path,
    npu: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NpuInt4Linear, "rows_limit", 400)
    folder = quantised(tmp_path, "PanguEmbedded", "q4_0_64", vocab=448)
    engine = TorchEngine(folder, torch.device("npu", 0), capacity=32)
    kinds = [type(module) for module in engine.model.modules()]
    assert isinstance(engine.model.lm_head, Int4Parts)
    assert kinds.count(NpuInt4Linear) == 2 * 4 + 2
    assert engine.describe()["dequantised"] == {}
    with torch.no_grad():
        exact = dequantised(folder)(torch.tensor([PROMPT])).logits[0, -1]
    assert relative(engine.prefill(PROMPT), exact) < 0.005
    assert engine.time_once(4, (3, 6)).decode_s.keys() == {3, 6}


def test_shapes_without_a_kernel_are_dequantised_and_reported(
    tmp_path: Path, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NpuInt4Linear, "rows_limit", 128)
    engine = TorchEngine(quantised(tmp_path, "llama", "q4_0"), torch.device("npu", 0), capacity=16)
    down = engine.model.model.layers[0].mlp.down_proj
    assert type(down) is torch.nn.Linear
    reason = f"q4_0: {down.in_features} columns are more than 128"
    assert engine.describe()["dequantised"] == {reason: 2}


def test_times_are_of_growing_prefixes_of_one_run(tmp_path: Path) -> None:
    engine = TorchEngine(tiny_checkpoint(tmp_path / "model"), CPU, capacity=70)
    timing = engine.time_once(4, (16, 64, 32))
    assert 0 < timing.decode_s[16] < timing.decode_s[32] < timing.decode_s[64]
    assert timing.prefill_s > 0


def test_the_footprint_counts_what_a_token_reads(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    engine = TorchEngine(folder, CPU, capacity=20)
    engine.time_once(4, (16,))
    found = engine.footprint()
    tensors = Checkpoint.open(folder).tensors
    size = {name: 2 * torch.Size(info.shape).numel() for name, info in tensors.items()}
    rotary = 2 * (64 // 4 // 2) * 4
    assert found.weight_bytes_per_token == sum(size.values()) - size["model.embed_tokens.weight"] + rotary
    assert (
        found.kv_bytes_per_position == 2 * 2 * 2 * 16 * 2
    )  # keys and values, layers, kv heads, width, bytes
    assert found.held_bytes == sum(size.values()) + rotary + 20 * found.kv_bytes_per_position
    assert found.model_bytes == (folder / "model.safetensors").stat().st_size
    assert found.peak_bytes is None or found.peak_bytes >= found.held_bytes


def test_a_tied_embedding_is_read_whole_for_every_token(tmp_path: Path) -> None:
    engine = TorchEngine(tiny_checkpoint(tmp_path / "model", "qwen2", tied=True), CPU, capacity=20)
    engine.time_once(4, (8,))
    found = engine.footprint()
    assert found.weight_bytes_per_token + 20 * found.kv_bytes_per_position == found.held_bytes


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2"])
def test_experts_decode_as_transformers_does_and_a_token_reads_those_it_is_routed_to(
    tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    engine = TorchEngine(folder, CPU, capacity=64)
    engine.prefill(PROMPT)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    theirs = reference.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert engine.decode(20).tolist() == theirs[0, len(PROMPT) :].tolist()
    tensors = Checkpoint.open(folder).tensors
    size = {name: 4 * torch.Size(info.shape).numel() for name, info in tensors.items()}
    routed = sum(bytes_ for name, bytes_ in size.items() if ".experts." in name)
    rotary = 2 * 8 * 4
    expected = sum(size.values()) - size["model.embed_tokens.weight"] - routed * 5 // 8 + rotary
    assert engine.footprint().weight_bytes_per_token == expected


def test_experts_in_4_bits_are_computed_in_16_and_reported(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model"))
    quantize_checkpoint(source, tmp_path / "packed", QuantizeOptions(type="q4_0"))
    engine = TorchEngine(tmp_path / "packed", CPU, capacity=16)
    assert engine.describe()["dequantised"] == {"q4_0: experts": 3 * 8 * 3}


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    engine = TorchEngine(tiny_checkpoint(tmp_path / "model"), CPU, capacity=20)
    engine.model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(CameraError, match="logits of the prompt are not finite in float32 on cpu"):
        engine.time_once(4, (8,))
