"""Mixtures of experts: every expert is quantised for the tokens that the router sends it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.digests import digest_files, files_below
from camera.errors import CameraError
from camera.formats.quantized_model import QuantizedModel
from camera.models.block import FEED_FORWARD, Block
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.factor import factor_moments
from camera.quantization.imatrix import collect_imatrix, read_imatrix, write_imatrix
from camera.quantization.methods.gptq import LEAST_TOKENS
from camera.quantization.plan import choose_types, plan_types
from tests.camera.formats.in_memory import quantize_by_gptq, quantize_by_search
from tests.tiny import TOKENS, tiny_moe_checkpoint

FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek_v2")
TOKENS_ST = torch.randint(3, TOKENS, (6, 48), generator=torch.Generator().manual_seed(0))
GPTQ = QuantizeOptions(type="q4_0", method="gptq", device="cpu", batch_size=4)
SEARCH = QuantizeOptions(type="q4_0", method="search", device="cpu", batch_size=4)


def whole_model_inputs(source: Checkpoint, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What enters every feed-forward matrix, [N, I] by name, with transformers' own model in memory.

    Args:
        source: the checkpoint.
        stored: numbers of matrices, in place of its own.
    """
    model = source.load_model(torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    fused = {
        name: place
        for layer in range(source.layer_count)
        for name, place in source.family.fused(source.config, layer).items()
    }
    for name, weight in stored.items():
        if (place := fused.get(name)) is not None:
            model.get_parameter(place.parameter).data[place.expert][place.rows] = weight
        else:
            model.get_parameter(name).data = weight
    routing: dict[int, tuple[torch.Tensor, ...]] = {}
    for layer in range(source.layer_count):
        if source.is_sparse(layer):
            watch_routing(model, layer, routing)
        for block in source.blocks(layer):
            if block.expert is None:
                for name in block.names:
                    watch_input(model, name, inputs)
    with torch.no_grad():
        model(input_ids=TOKENS_ST)
    for layer, (hidden_TH, index_TK) in routing.items():
        for block in source.blocks(layer):
            if block.expert is not None:
                rows_NH = hidden_TH[(index_TK == block.expert).any(-1)]
                gate, up = (
                    model.get_parameter(fused[name].parameter).data[block.expert][fused[name].rows]
                    for name in (block.gate, block.up)
                )
                act = torch.nn.functional.silu(rows_NH @ gate.T) * (rows_NH @ up.T)
                inputs |= {block.gate: rows_NH, block.up: rows_NH, block.down: act}
    return inputs


def watch_input(model: torch.nn.Module, name: str, inputs: dict[str, torch.Tensor]) -> None:
    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[name] = args[0].flatten(0, -2)

    model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(keep)


def watch_routing(model: torch.nn.Module, layer: int, routing: dict[int, tuple[torch.Tensor, ...]]) -> None:
    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        routing[layer] = args[:2]

    model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(keep)


def matrices(source: Checkpoint) -> list[tuple[Block, str, str]]:
    return [
        (block, role, block.by_role[role])
        for layer in range(source.layer_count)
        for block in source.blocks(layer)
        for role in FEED_FORWARD
    ]


def idle(folder: Path) -> Checkpoint:
    """A model whose router sends expert 5 of every layer no token."""
    folder = tiny_moe_checkpoint(folder, "deepseek_v3", n_group=4, topk_group=4)
    tensors = {name: each.clone() for name, each in read_tensors(folder / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[5] = -10.0
    write_tensors(folder / "model.safetensors", tensors)
    return Checkpoint.open(folder)


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny_moe_checkpoint(tmp_path / "source", request.param))


def test_the_importance_matrix_is_of_each_experts_own_tokens(source: Checkpoint) -> None:
    found = collect_imatrix(source, TOKENS_ST, SEARCH)
    expected = whole_model_inputs(source, {})
    for _, _, name in matrices(source):
        assert found.counts[name] == len(expected[name])
        torch.testing.assert_close(found.sums[name], expected[name].square().sum(0), rtol=1e-4, atol=1e-5)
    for layer in range(source.layer_count):
        for group in source.shared_inputs(layer):
            assert {f"model.layers.{layer}.{linear}.weight" for linear in group} <= found.sums.keys()


def test_experts_of_a_file_lie_as_llama_cpp_has_them_and_read_back(
    tmp_path: Path, source: Checkpoint
) -> None:
    made = collect_imatrix(source, TOKENS_ST, SEARCH)
    write_imatrix(tmp_path / "imatrix.gguf", made, source)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    sums = tensors["blk.1.ffn_down_exps.weight.in_sum2"]
    counts = tensors["blk.1.ffn_down_exps.weight.counts"]
    assert (list(sums.shape), list(counts.shape)) == ([96, 8], [1, 8])  # ggml's order
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        np.testing.assert_array_equal(sums.data[expert], made.sums[name].numpy())
        assert counts.data[expert, 0] == made.counts[name]
    assert not [
        name for name in tensors if "kv_b" in name
    ]  # llama.cpp multiplies its parts by something else
    read = read_imatrix(tmp_path / "imatrix.gguf", source)
    for _, _, name in matrices(source):
        assert torch.equal(read.sums[name], made.sums[name])
        assert read.counts[name] == made.counts[name]


def test_a_file_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    sources = [
        Checkpoint.open(tiny_moe_checkpoint(tmp_path / str(count), "qwen3_moe", num_experts=count))
        for count in (8, 4)
    ]
    write_imatrix(tmp_path / "imatrix.gguf", collect_imatrix(sources[0], TOKENS_ST, SEARCH), sources[0])
    with pytest.raises(
        CameraError, match=r"_exps\.weight has 8 matrices and .* has 4: it was made from another model"
    ):
        read_imatrix(tmp_path / "imatrix.gguf", sources[1])


def test_search_weighs_each_expert_by_its_own_tokens(tmp_path: Path, source: Checkpoint) -> None:
    imatrix = collect_imatrix(source, TOKENS_ST, SEARCH)
    quantize_checkpoint(source, tmp_path / "out", SEARCH, TOKENS_ST)
    model = QuantizedModel.open(tmp_path / "out")
    for _, _, name in matrices(source):
        expected = quantize_by_search(source.read(name), "q4_0", imatrix.importance(name))
        np.testing.assert_array_equal(model.packed(name), expected)


def test_gptq_rounds_each_expert_for_what_the_stored_matrices_before_it_put_out(
    tmp_path: Path, source: Checkpoint
) -> None:
    quantize_checkpoint(source, tmp_path / "out", GPTQ, TOKENS_ST)
    model = QuantizedModel.open(tmp_path / "out")
    stored = {name: model.dequantize(name) for name in model.tensors}
    inputs = whole_model_inputs(source, stored)
    for block, role, name in matrices(source):
        rows_NI = inputs[name].double()
        if block.expert is not None and len(rows_NI) < LEAST_TOKENS:
            continue
        factor = factor_moments(rows_NI.T @ rows_NI, GPTQ.damping)
        expected = quantize_by_gptq({name: source.read(name)}, "q4_0", factor)[name]
        # A tie in a sum of another order falls the other way, and moves what is rounded after it.
        assert (model.packed(name) == expected).mean() > 0.9, (block.label, role)


def test_gptq_loses_less_of_the_experts_outputs_than_rounding_to_nearest(
    tmp_path: Path, source: Checkpoint
) -> None:
    tokens_ST = torch.randint(3, TOKENS, (40, 64), generator=torch.Generator().manual_seed(1))
    held_out = torch.randint(3, TOKENS, (4, 48), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = source.load_model(torch.float32)(input_ids=held_out).logits
    lost = {}
    for method in ("gptq", "rtn"):
        options = GPTQ.model_copy(update={"method": method})
        quantize_checkpoint(source, tmp_path / method, options, tokens_ST)
        folder = tiny_moe_checkpoint(tmp_path / f"{method}-model", source.family.model_type)
        write_tensors(folder / "model.safetensors", QuantizedModel.open(tmp_path / method).state_dict())
        with torch.no_grad():
            after = Checkpoint.open(folder).load_model(torch.float32)(input_ids=held_out).logits
        lost[method] = float((after - before).square().mean())
    assert lost["gptq"] < 0.9 * lost["rtn"]


@pytest.mark.parametrize("options", [GPTQ, SEARCH], ids=["gptq", "search"])
def test_an_expert_without_tokens_is_searched_with_equal_weights_and_counted(
    tmp_path: Path, options: QuantizeOptions
) -> None:
    source = idle(tmp_path / "source")
    report = quantize_checkpoint(source, tmp_path / "out", options, TOKENS_ST)
    model = QuantizedModel.open(tmp_path / "out")
    for block, _, name in matrices(source):
        if block.expert == 5:
            np.testing.assert_array_equal(model.packed(name), quantize_by_search(source.read(name), "q4_0"))
            assert model.tensors[name].few_tokens == (0 if options.method == "gptq" else None)
            assert model.tensors[name].weighted_error is None
    if options.method == "gptq":
        few, of_all = report.few_tokens
        assert of_all == 2 * 8
        assert 2 <= few < of_all


class Killed(BaseException):
    """As a signal would: nothing in the code under test may catch it."""


@pytest.mark.parametrize("tensors_done", [20, 60])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, source: Checkpoint, tensors_done: int
) -> None:
    quantize_checkpoint(source, tmp_path / "whole", GPTQ, TOKENS_ST)

    def kill(done: int, total: int) -> None:
        if done == tensors_done:
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(source, tmp_path / "out", GPTQ, TOKENS_ST, progress=kill)
    partial = json.loads((tmp_path / "out" / "quantized.partial.json").read_text())["report"]
    assert partial["shards"] or tensors_done == 20
    quantize_checkpoint(source, tmp_path / "out", GPTQ, TOKENS_ST)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert digest_files(out, files_below(out)) == digest_files(whole, files_below(whole))


def test_overrides_that_split_the_experts_of_a_layer_are_refused(source: Checkpoint) -> None:
    options = GPTQ.model_copy(update={"overrides": {"*.experts.3.up_proj.weight": "q8_0"}})
    with pytest.raises(
        CameraError, match=r"experts\.0\.up_proj.* is q4_0 and .*experts\.3\.up_proj.* is q8_0.*one type"
    ):
        plan_types(source, options)
    whole = GPTQ.model_copy(update={"overrides": {"*.experts.*.up_proj.weight": "q8_0"}})
    assert {planned.type for planned in plan_types(source, whole) if "experts.3.up" in planned.name} == {
        "q8_0"
    }


def test_a_target_gives_the_experts_of_a_layer_one_type_for_each_role(
    tmp_path: Path, source: Checkpoint
) -> None:
    options = SEARCH.model_copy(update={"target_bpw": 9.0, "method": "rtn"})
    report = quantize_checkpoint(source, tmp_path / "out", options, TOKENS_ST)
    types: dict[tuple[str, str], set[str]] = {}
    for block, role, name in matrices(source):
        if block.expert is not None:
            record = next(record for record in report.tensors if record.name == name)
            types.setdefault((block.prefix, role), set()).add(record.type)
    assert all(len(found) == 1 for found in types.values())
    assert "q8_0" in set().union(*types.values())
    assert 8.0 < report.bits_per_weight <= 9.0


def test_an_expert_without_tokens_is_worth_no_bits(tmp_path: Path) -> None:
    from camera.quantization.sensitivity import sensitivities

    source = idle(tmp_path / "source")
    imatrix = collect_imatrix(source, TOKENS_ST, SEARCH)
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(8)]
    noise = sensitivities(source, imatrix, dict.fromkeys(names, ("q4_0", "q8_0")))
    assert noise[names[5]]["q4_0"] == 0
    assert sum(each["q4_0"] > 0 for each in noise.values()) == 7
    choose_types(source, SEARCH.model_copy(update={"target_bpw": 7.0}), imatrix)
