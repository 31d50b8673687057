"""Mixtures of experts in GGUF files: experts end to end, latent attention in parts, and all of it back."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.formats.convert import convert_to_gguf, write_twin
from camera.formats.gguf_reader import hf_config, hf_names, open_gguf, packed_hf_tensor, read_hf_tensor
from camera.formats.quantized_model import QuantizedModel
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import MOE_TYPES_IN_GGUF, tiny_moe_checkpoint

LATENT = ("deepseek_v2", "deepseek_v3")


ASKED = {"olmoe": {"num_key_value_heads": 4}}
"""What llama.cpp asks of a family: here norms of keys as wide as the model, so as many key heads as heads."""


def packed(folder: Path, model_type: str, type: str = "f32", **options: Any) -> Path:
    """The folder of packed tensors of a tiny model."""
    source = tiny_moe_checkpoint(folder / "source", model_type, **{**ASKED.get(model_type, {}), **options})
    quantize_checkpoint(Checkpoint.open(source), folder / "packed", QuantizeOptions(type=type))
    return folder / "packed"


def converted(folder: Path, model_type: str, type: str = "f32", **options: Any) -> Path:
    convert_to_gguf(packed(folder, model_type, type, **options), folder / "model.gguf", name="tiny")
    return folder / "model.gguf"


@pytest.mark.parametrize("type", ["f16", "q4_0"])
@pytest.mark.parametrize("model_type", MOE_TYPES_IN_GGUF)
def test_every_expert_is_given_back_to_the_bit(tmp_path: Path, model_type: str, type: str) -> None:
    file = open_gguf(converted(tmp_path, model_type, type))
    model = QuantizedModel.open(tmp_path / "packed")
    assert file.family == model.family
    assert hf_names(file).keys() == model.tensors.keys()
    for name, record in model.tensors.items():
        stored_type, data = packed_hf_tensor(file, name)
        assert stored_type == record.type
        np.testing.assert_array_equal(data.reshape(-1), model.packed(name).reshape(-1))
        assert torch.equal(read_hf_tensor(file, name), model.dequantize(name))


@pytest.mark.parametrize("model_type", MOE_TYPES_IN_GGUF)
def test_the_config_says_what_the_model_was_made_of(tmp_path: Path, model_type: str) -> None:
    file = open_gguf(converted(tmp_path, model_type))
    source, config = read_json(tmp_path / "source" / "config.json"), hf_config(file)
    family = file.family
    assert family.experts is not None
    for layer in range(3):
        assert family.blocks(config, layer) == family.blocks(source, layer)
    assert family.experts.count(config) == family.experts.count(source)
    assert family.experts.chosen(config) == family.experts.chosen(source)
    assert {name: family.shape(config, placed.weight) for name, placed in family.names(config).items()} == {
        name: family.shape(source, placed.weight) for name, placed in family.names(source).items()
    }


def test_experts_lie_end_to_end_as_llama_cpp_s_library_reads_them(tmp_path: Path) -> None:
    path = converted(tmp_path, "qwen3_moe")
    source = Checkpoint.open(tmp_path / "source")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for role, shape in (("gate", (8, 96, 64)), ("up", (8, 96, 64)), ("down", (8, 64, 96))):
        merged = tensors[f"blk.1.ffn_{role}_exps.weight"].data
        assert merged.shape == shape
        for expert in range(8):
            name = f"model.layers.1.mlp.experts.{expert}.{role}_proj.weight"
            np.testing.assert_array_equal(merged[expert], source.read(name).numpy())


def test_latent_keys_are_transposed_and_values_are_not(tmp_path: Path) -> None:
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(converted(tmp_path, LATENT[0])).tensors}
    both = Checkpoint.open(tmp_path / "source").read("model.layers.0.self_attn.kv_b_proj.weight")
    keys, values = both.view(4, 64, 32).split(32, dim=1)
    np.testing.assert_array_equal(tensors["blk.0.attn_k_b.weight"], keys.transpose(1, 2).numpy())
    np.testing.assert_array_equal(tensors["blk.0.attn_v_b.weight"], values.numpy())


def test_latent_parts_in_blocks_of_another_tool_are_read_as_float32(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "stock.gguf", "deepseek2")
    file = open_gguf(converted(tmp_path, LATENT[0]))
    for key, value in file.metadata.items():
        kind, item_kind = file.value_types[key]
        if key not in ("general.architecture", "general.alignment"):
            writer.add_key_value(
                key, value, gguf.GGUFValueType(kind), item_kind and gguf.GGUFValueType(item_kind)
            )
    for name, tensor in file.tensors.items():
        numbers = file.dequantize(name).numpy()
        if name.endswith("attn_k_b.weight"):
            rounded = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, rounded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, numbers)
        assert tensor.type == "f32"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    stock, ours = open_gguf(tmp_path / "stock.gguf"), read_hf_tensor(file, name)
    assert packed_hf_tensor(stock, name)[0] == "f32"
    assert 0 < (read_hf_tensor(stock, name) - ours).abs().max() < ours.abs().max() / 100


def test_routers_and_gates_stay_float32_whatever_is_asked(tmp_path: Path) -> None:
    file = open_gguf(converted(tmp_path, "qwen2_moe", "q4_0"))
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp_shexp.weight"):
        assert file.tensors[name].type == "f32"
    assert file.tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (64,)


def test_experts_of_two_types_are_refused_with_their_names(tmp_path: Path) -> None:
    """`quantize` writes no such folder; another tool may."""
    folder, other = packed(tmp_path, "qwen3_moe", "q4_0"), tmp_path / "other"
    quantize_checkpoint(Checkpoint.open(tmp_path / "source"), other, QuantizeOptions(type="q8_0"))
    convert_to_gguf(folder, tmp_path / "one.gguf", name="one")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    reports = [read_json(each / "quantized.json") for each in (folder, other)]
    records = [{record["name"]: record for record in report["tensors"]} for report in reports]
    records[0][name] = records[1][name]
    write_json(folder / "quantized.json", reports[0] | {"tensors": list(records[0].values())})
    shard = records[1][name]["file"]
    tensors = load_file(folder / shard) | {name: load_file(other / shard)[name]}
    write_tensors(folder / shard, tensors)
    with pytest.raises(
        CameraError, match=r"ffn_up_exps.*experts\.0\.up_proj.*q4_0.*experts\.3\.up_proj.*q8_0"
    ):
        convert_to_gguf(folder, tmp_path / "two.gguf", name="two")
    assert not (tmp_path / "two.gguf").exists()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = packed(tmp_path, "olmoe")
    report = read_json(folder / "quantized.json")
    gone = "model.layers.2.mlp.experts.7.down_proj.weight"
    report["tensors"] = [record for record in report["tensors"] if record["name"] != gone]
    (folder / "quantized.json").write_text(json.dumps(report))
    with pytest.raises(CameraError, match=rf"{gone} is missing, and config\.json asks for it"):
        convert_to_gguf(folder, tmp_path / "model.gguf", name="tiny")


def test_dense_layers_that_no_key_can_tell_of_are_refused(tmp_path: Path) -> None:
    folder = packed(tmp_path, "qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(CameraError, match=r"layer 1 has no experts.*qwen3moe"):
        convert_to_gguf(folder, tmp_path / "model.gguf", name="tiny")


@pytest.mark.parametrize(
    ("model_type", "options", "warning"),
    [
        ("phimoe", {}, "mixes sparsely"),
        (
            "deepseek_v2",
            {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
            "two best",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "makes add up to 1"),
        ("qwen2_moe", {"norm_topk_prob": True}, "leaves as they are"),
        ("olmoe", {"clip_qkv": 8.0}, "does not clip"),
        ("mixtral", {"sliding_window": 128}, "sliding window"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_said(
    tmp_path: Path, model_type: str, options: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed(tmp_path, model_type, **options)
    (said,) = convert_to_gguf(folder, tmp_path / "model.gguf", name="tiny")["warnings"]
    assert warning in said
    assert caplog.messages[-1] == f"model.gguf: {said}"


def test_experts_that_fell_back_alike_are_one_line(tmp_path: Path) -> None:
    report = QuantizedModel.open(packed(tmp_path, "mixtral", "q4_0_64", intermediate_size=128)).report
    assert len(report.fallbacks) == 3 * 8 * 3
    names = [f"model.layers.*.block_sparse_moe.experts.*.w{number}.weight" for number in (1, 2, 3)]
    assert [(name, type) for name, type, _ in report.fallback_lines] == [(name, "q4_0") for name in names]


def test_a_family_without_an_architecture_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = packed(tmp_path, "PanguProMoE")
    with pytest.raises(CameraError, match=r"PanguProMoE.*no architecture"):
        convert_to_gguf(folder, tmp_path / "model.gguf", name="tiny")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("olmoe", {"num_key_value_heads": 2}, "fewer key-value heads"),
        ("phimoe", {"lm_head_bias": False}, "lm_head_bias"),
    ],
)
def test_a_model_that_llama_cpp_would_not_load_is_refused(
    tmp_path: Path, model_type: str, options: dict[str, Any], reason: str
) -> None:
    folder = packed(tmp_path, model_type, **options)
    with pytest.raises(CameraError, match=f"llama.cpp would not load.*{reason}"):
        convert_to_gguf(folder, tmp_path / "model.gguf", name="tiny")


def test_layers_that_predict_further_tokens_in_files_of_other_tools_are_left_aside(tmp_path: Path) -> None:
    file = open_gguf(converted(tmp_path, "glm4_moe", layers=4))
    wanted = {name for name in hf_names(file) if ".layers.3." not in name}
    file.metadata["glm4moe.nextn_predict_layers"] = 1
    file.memo.clear()
    assert hf_names(file).keys() == wanted
    assert hf_config(file)["num_hidden_layers"] == 3


def test_the_twin_of_experts_in_q4_0_64_has_their_numbers(tmp_path: Path) -> None:
    source = tiny_moe_checkpoint(tmp_path / "source", "qwen3_moe", moe_intermediate_size=128)
    options = QuantizeOptions(type="q4_0_64", overrides={"*.experts.*": "q4_0_64"})
    quantize_checkpoint(Checkpoint.open(source), tmp_path / "packed", options)
    convert_to_gguf(tmp_path / "packed", tmp_path / "model.gguf", name="tiny")
    write_twin(tmp_path / "model.gguf", tmp_path / "twin.gguf")
    file, twin = open_gguf(tmp_path / "model.gguf"), open_gguf(tmp_path / "twin.gguf")
    name = "blk.1.ffn_down_exps.weight"
    assert (file.tensors[name].type, twin.tensors[name].type) == ("q4_0_64", "q4_0")
    for hf_name in hf_names(file):
        assert torch.equal(read_hf_tensor(file, hf_name), read_hf_tensor(twin, hf_name))


def test_a_number_of_experts_that_tensors_do_not_have_is_refused(tmp_path: Path) -> None:
    path = converted(tmp_path, "qwen3_moe")
    content = path.read_bytes()
    key = b"qwen3moe.expert_count\x04\x00\x00\x00"
    path.write_bytes(content.replace(key + b"\x08\x00\x00\x00", key + b"\xff\xff\xff\x7f"))
    with pytest.raises(CameraError, match=r"expert_count is 2147483647.*shape \[8, "):
        hf_names(open_gguf(path))
