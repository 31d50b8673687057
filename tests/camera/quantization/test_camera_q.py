"""CAMERA-Q simulated: bits by importance of an expert's channels, and what they count."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json
from camera.options import QuantizeOptions
from camera.quantization.camera_q import CameraQ, Group, groups_by_rank, round_columns, simulate_camera_q
from camera.quantization.factor import Factor, factor_moments
from tests.tiny import TOKENS, tiny_checkpoint, tiny_moe_checkpoint

TOKENS_ST = torch.randint(3, TOKENS, (6, 48), generator=torch.Generator().manual_seed(0))
OPTIONS = QuantizeOptions(device="cpu", batch_size=4)


def numbers_in(vector: torch.Tensor) -> int:
    return len(vector.unique())


def simulated(source: Checkpoint, out: Path, scheme: CameraQ) -> Checkpoint:
    simulate_camera_q(source, out, TOKENS_ST, scheme, OPTIONS)
    return Checkpoint.open(out)


@pytest.fixture(params=["qwen3_moe", "qwen2_moe", "deepseek_v2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny_moe_checkpoint(tmp_path / "source", request.param, shards=2))


def test_the_most_important_channels_are_in_the_first_group() -> None:
    groups = (Group(3, 0.25), Group(2, 0.5), Group(1, 0.25))
    found = groups_by_rank(torch.tensor([5.0, 1.0, 8.0, 8.0, 2.0, 0.0, 3.0, 4.0]), groups)
    assert found.tolist() == [1, 2, 0, 0, 1, 2, 1, 1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_group_of_columns_takes_as_many_numbers_as_its_bits_can_tell_apart(bits: int) -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    found = round_columns(weight, Factor.identity(128), torch.full((128,), bits))
    for row in found:
        for part in row.split(64):
            assert numbers_in(part) <= 2**bits
    error = float((found - weight).square().mean())
    assert error < {1: 0.42, 2: 0.14, 3: 0.045, 4: 0.015}[bits]  # a little above the best for normal numbers


def test_compensation_spares_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 64, generator=generator) @ torch.randn(64, 128, generator=generator)
    weight, moments = torch.randn(16, 128, generator=generator), (inputs.T @ inputs).double()
    bits = torch.tensor([3] * 40 + [2] * 48 + [1] * 40)
    alone = round_columns(weight, Factor.identity(128), bits)
    compensated = round_columns(weight, factor_moments(moments, 0.01), bits)
    lost = [float((inputs @ (found - weight).T).square().mean()) for found in (alone, compensated)]
    assert lost[1] < 0.75 * lost[0]


def test_what_is_written_is_the_model_with_other_experts(source: Checkpoint, tmp_path: Path) -> None:
    out = simulated(source, tmp_path / "out", CameraQ())
    assert out.config == source.config
    rounded = {
        name
        for layer in range(source.layer_count)
        if source.is_sparse(layer)
        for name in source.ffn_names(layer)
    }
    assert out.tensors == source.tensors
    for name in source.tensors:
        assert torch.equal(out.read(name), source.read(name)) == (name not in rounded), name
    with torch.no_grad():
        logits = out.load_model(torch.float32)(input_ids=TOKENS_ST).logits
    assert logits.isfinite().all()


def test_a_channel_has_one_precision_in_all_three_matrices(source: Checkpoint, tmp_path: Path) -> None:
    scheme = CameraQ((Group(3, 0.5), Group(1, 0.5)), "expert")
    out = simulated(source, tmp_path / "out", scheme)
    layer = source.layer_count - 1
    for block in out.blocks(layer):
        gate_FH, up_FH, down_HF = (out.read(name) for name in block.names)
        coarse = [numbers_in(row) <= 2 for row in gate_FH]
        assert sum(coarse) == len(coarse) // 2
        assert coarse == [numbers_in(row) <= 2 for row in up_FH]
        kept = [channel for channel, few in enumerate(coarse) if few]
        for row in down_HF[:, kept]:  # in steps of 64 columns: two numbers for each
            assert numbers_in(row.abs()) <= -(-len(kept) // 64)


def test_bits_count_codes_and_steps(source: Checkpoint, tmp_path: Path) -> None:
    for scope in ("expert", "layer"):
        scheme = CameraQ((Group(3, 0.25), Group(2, 0.5), Group(1, 0.25)), scope)
        simulated(source, tmp_path / scope, scheme)
        summary = read_json(tmp_path / scope / "camera_q.json")
        of_experts = sum(
            source.tensors[name].shape[0] * source.tensors[name].shape[1]
            for layer in range(source.layer_count)
            if source.is_sparse(layer)
            for name in source.ffn_names(layer)
        )
        assert summary["weights"] == of_experts
        channels = [group["channels"] for group in summary["groups"]]
        assert channels[0] == pytest.approx(sum(channels) / 4, rel=0.01)
        # Rows of 64 share one step; the columns of down are up to two more groups than their number asks for.
        assert 2 + 16 / 64 <= summary["bits_per_weight"] < 2 + 2 * 16 / 64 + 0.1
    uniform = simulate_camera_q(source, tmp_path / "2", TOKENS_ST, CameraQ((Group(2, 1.0),)), OPTIONS)
    width = source.config.get("moe_intermediate_size")
    assert uniform["bits_per_weight"] == pytest.approx(2 + 16 / 64 * (2 + 2 * 64 / width) / 3, abs=0.02)


def test_layers_are_rounded_for_what_the_rounded_ones_before_put_out(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "source", "qwen3_moe"))
    first, second = (simulated(source, tmp_path / str(bits), CameraQ((Group(bits, 1.0),))) for bits in (4, 1))
    alone = simulated(source, tmp_path / "alone", CameraQ((Group(1, 1.0),), compensates=False))
    again = simulated(first, tmp_path / "again", CameraQ((Group(1, 1.0),)))
    name = f"model.layers.{source.layer_count - 1}.mlp.experts.0.up_proj.weight"
    assert not torch.equal(again.read(name), second.read(name))
    weight = source.read(name)  # without compensation nothing but the matrix itself counts
    bits = torch.ones(weight.shape[1], dtype=torch.int64)
    assert torch.equal(alone.read(name), round_columns(weight, Factor.identity(weight.shape[1]), bits))


def test_a_model_without_experts_and_groups_that_cannot_be_are_refused(tmp_path: Path) -> None:
    dense = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    with pytest.raises(CameraError, match="has no experts"):
        simulate_camera_q(dense, tmp_path / "out", TOKENS_ST, CameraQ(), OPTIONS)
    source = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "source"))
    for groups in ((Group(3, 0.5), Group(2, 0.4)), (Group(7, 1.0),)):
        with pytest.raises(CameraError, match="shares add up to 1, and bits are 1 to 4"):
            simulate_camera_q(source, tmp_path / "out", TOKENS_ST, CameraQ(groups), OPTIONS)
    assert not (tmp_path / "out").exists()
