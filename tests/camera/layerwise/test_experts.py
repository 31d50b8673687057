"""A layer whose tokens are routed puts out what transformers' own puts out, and computes nothing that nobody asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise import experts, experts_pass
from camera.layerwise.experts_pass import Buffers, ExpertsPass
from camera.layerwise.feed_forward import Samples
from camera.layerwise.runner import LayerRunner
from tests.tiny import MOE_TYPES, tiny_moe_checkpoint

CPU = torch.device("cpu")


def run_pass(
    checkpoint: Checkpoint, index: int, hidden_STH: torch.Tensor, batch: int = 2
) -> tuple[torch.Tensor, ExpertsPass]:
    """What a sparse layer makes of hidden states, block by block, and the pass."""
    runner = LayerRunner(checkpoint, CPU, hidden_STH.dtype)
    out_STH = hidden_STH.clone()
    samples = Samples(out_STH, batch, [False] * len(out_STH))
    with torch.inference_mode(), runner.layer(index) as module:
        buffers = Buffers(out_STH, lambda: torch.empty_like(out_STH))
        run = ExpertsPass(runner, index, module, runner.caller(out_STH.shape[1]), samples, buffers)
        for block in run.blocks:
            run.observe(block)
            run.put_out(block, None, {})
        run.finish()
    return out_STH, run


def whole(checkpoint: Checkpoint, index: int, hidden_STH: torch.Tensor) -> torch.Tensor:
    """What transformers' own layer makes of them, its experts computed in its plain way."""
    model = checkpoint.load_model(hidden_STH.dtype)
    model.set_experts_implementation("eager")
    positions = torch.arange(hidden_STH.shape[1])[None]
    rotary = model.get_submodule(checkpoint.family.rotary_module)
    with torch.no_grad():
        out = model.model.layers[index](
            hidden_STH,
            position_embeddings=rotary(hidden_STH, positions),
            position_ids=positions,
            attention_mask=None,
        )
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result


def states(dtype: torch.dtype) -> torch.Tensor:
    """Hidden states of five samples, no multiple of a batch of two."""
    return torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_expert_by_expert_it_is_the_layer_of_transformers(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type, dtype=dtype))
    hidden_STH = states(dtype)
    out_STH, _ = run_pass(checkpoint, 2, hidden_STH)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out_STH, whole(checkpoint, 2, hidden_STH), **tolerance)


def test_every_expert_sees_its_own_tokens_once_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", "qwen2_moe"))
    rows: list[int] = []
    compute = experts.activations

    def counting(hidden_NH: torch.Tensor, *arguments: Any) -> torch.Tensor:
        rows.append(len(hidden_NH))
        return compute(hidden_NH, *arguments)

    monkeypatch.setattr(experts_pass, "activations", counting)
    _, run = run_pass(checkpoint, 2, states(torch.float32))
    assert rows == [*(count for count in run.tokens_E.tolist() if count), 5 * 32]
    assert run.tokens_E.sum() == 5 * 32 * 3


def test_of_an_expert_without_tokens_nothing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_names: list[str]
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", "mixtral"))
    runner = LayerRunner(checkpoint, CPU, torch.float32)
    with torch.inference_mode(), runner.layer(1) as module:
        of_layer = experts.attached(runner.experts_module(module))
        read_names.clear()
        index_TK = torch.tensor([[1, 6], [6, 1], [1, 2]])
        of_layer(experts.Routing(torch.randn(3, 64), index_TK, torch.rand(3, 2)))
    read = {name.split("experts.")[1].split(".")[0] for name in read_names}
    assert read == {"1", "2", "6"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_token_becomes_does_not_depend_on_how_many_others_there_are(dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    gate, up, down = (
        torch.randn(shape, generator=chance).to(dtype) for shape in ((96, 64), (96, 64), (64, 96))
    )
    matrices = experts.Matrices(gate, up, down)
    x_NH, weight_N = torch.randn(70, 64, generator=chance).to(dtype), torch.rand(70, generator=chance)
    act_NF = experts.activations(x_NH, matrices, torch.nn.functional.silu)
    out_NH = experts.output(act_NF, down, weight_N.to(dtype))
    for count in (1, 2, 3, 5, 15, 16, 17, 33, 64):
        few_NF = experts.activations(x_NH[:count], matrices, torch.nn.functional.silu)
        assert torch.equal(few_NF, act_NF[:count]), count
        assert torch.equal(experts.output(few_NF, down, weight_N[:count].to(dtype)), out_NH[:count]), count


def test_in_any_batches_and_chunks_sums_and_output_are_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", "PanguProMoE", dtype=torch.bfloat16))
    one, run = run_pass(checkpoint, 1, states(torch.bfloat16), batch=5)
    monkeypatch.setattr(experts_pass, "CHUNK_BYTES", 1)
    other, again = run_pass(checkpoint, 1, states(torch.bfloat16), batch=1)
    assert torch.equal(one, other)
    assert torch.equal(run.energy_E, again.energy_E)
    assert torch.equal(run.tokens_E, again.tokens_E)
