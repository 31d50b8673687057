"""Decoding in steps of fixed shapes, which a device can record; here they run as they are."""

import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from camera.checkpoints.checkpoint import Checkpoint
from camera.engines.parts import step as step_module
from camera.engines.parts.fusion import Member
from camera.engines.parts.launches import launches_of
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError
from tests.tiny import MODEL_TYPES, MOE_TYPES, tiny_checkpoint, tiny_moe_checkpoint

CPU = torch.device("cpu")
PROMPT = [1, 5, 9, 33, 120, 7]
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal")
"""Operators whose result the host reads."""


WINDOWS: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 12},
    "qwen2_moe": {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
}
"""Attention that forgets: in all layers, or in those behind the first."""


def checkpoint(folder: Path, model_type: str, layers: int = 2) -> Path:
    if model_type in MODEL_TYPES:
        return tiny_checkpoint(folder, model_type, layers=layers, tied=model_type == "qwen3")
    return tiny_moe_checkpoint(folder, model_type, layers=layers, **WINDOWS.get(model_type, {}))


def greedy(model: PreTrainedModel, count: int) -> torch.Tensor:
    return model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *MOE_TYPES])
def test_tokens_and_logits_are_transformers_at_every_length_and_no_step_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr(step_module, "POSITIONS_TOGETHER", 16)  # so that 40 tokens see three widths
    folder = checkpoint(tmp_path / "model", model_type)
    engine = TorchEngine(folder, CPU, capacity=48)
    first = engine.prefill(PROMPT).clone()
    growing = engine.decode(40)
    reference = Checkpoint.open(folder).load_model(torch.float32)
    tokens_1T = greedy(reference, 42)
    assert growing.tolist() == tokens_1T[0, len(PROMPT) : -2].tolist()

    engine.step = engine.fixed_step()
    assert torch.equal(engine.prefill(PROMPT), first)
    found = [*engine.decode(1), *engine.decode(30), *engine.decode(9)]
    assert found == growing.tolist()
    assert not launches_of(lambda: engine.decode(1)).keys() & set(WAITS)
    with torch.no_grad():
        exact_V = reference(tokens_1T[:, :-1]).logits[0, -1]
    assert float((engine.step.logits_V - exact_V).abs().max()) < 1e-5 * float(exact_V.abs().max())


def test_more_tokens_than_the_cache_holds_are_refused(tmp_path: Path) -> None:
    engine = TorchEngine(checkpoint(tmp_path / "model", "llama"), CPU, capacity=20)
    engine.step = engine.fixed_step()
    engine.prefill(PROMPT)
    engine.decode(14)
    with pytest.raises(CameraError, match="21 positions do not fit a cache of 20"):
        engine.decode(1)


def test_a_layer_launches_one_product_for_query_key_and_value_and_one_for_gate_and_up(tmp_path: Path) -> None:
    totals, products = [], []
    for layers in (1, 2):
        engine = TorchEngine(checkpoint(tmp_path / f"{layers}", "llama", layers), CPU, capacity=20)
        engine.step = engine.fixed_step()
        engine.prefill(PROMPT)
        launched = launches_of(partial(engine.decode, 1))
        totals.append(sum(launched.values()))
        products.append(launched["linear"])
        assert sum(isinstance(module, Member) for module in engine.model.modules()) == 5 * layers
    assert products[1] - products[0] == 4  # transformers launches seven
    assert totals[1] - totals[0] <= 33  # and 36 in all; compiled layers launch fewer still


def test_a_device_without_graphs_decodes_step_by_step_and_says_why(
    tmp_path: Path, npu: types.ModuleType
) -> None:
    folder = checkpoint(tmp_path / "model", "PanguEmbedded")
    engine = TorchEngine(folder, torch.device("npu", 0), capacity=20)
    engine.prefill(PROMPT)
    tokens = engine.decode(14).clone().cpu()
    assert tokens.tolist() == greedy(Checkpoint.open(folder).load_model(torch.float32), 14)[0, 6:].tolist()
    step = engine.describe()["step"]
    assert (step["graph"], step["layers"]) == (False, "plain")
    assert "NPUGraph" in step["failed"]["a graph of plain layers"]


@pytest.mark.slow
def test_all_layers_are_compiled_as_one_and_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "POSITIONS_TOGETHER", 16)
    monkeypatch.setitem(step_module.COMPILERS, "cpu", {"compiled": {}})
    engine = TorchEngine(checkpoint(tmp_path / "model", "llama", layers=3), CPU, capacity=80)
    engine.prefill(PROMPT)
    plain = engine.decode(72)
    engine.step = engine.fixed_step()
    torch.compiler.reset()  # another test may have compiled the same layer
    engine.step.choose("compiled")
    engine.prefill(PROMPT)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(engine.decode(72), plain)
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] == 3  # for the first width, any other, and all positions
    assert not stats["graph_break"]
