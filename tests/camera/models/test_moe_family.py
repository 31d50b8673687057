"""What a family's file says of a mixture of experts is what transformers saves and builds, and llama.cpp's library names."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.models import FAMILIES, family_of, family_of_architecture, named_weights
from camera.models.block import FEED_FORWARD
from tests.conftest import REPOSITORY
from tests.tiny import MOE_TYPES, tiny_moe_checkpoint

DENSE_FIRST = {"deepseek", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe"}
SHARED = {
    "PanguProMoE": 160,
    "deepseek": 192,
    "deepseek_v2": 192,
    "deepseek_v3": 96,
    "ernie4_5_moe": 192,
    "glm4_moe": 96,
    "hunyuan_v1_moe": 96,
    "qwen2_moe": 160,
}
NAMED_OTHERWISE = {"e_score_correction_bias": "e_score_correction.bias"}
"""As llama.cpp's converter changes names before it asks the name map."""


def changed(folder: Path, **keys: Any) -> Path:
    write_json(folder / "config.json", read_json(folder / "config.json") | keys)
    return folder


def test_every_family_with_experts_has_tests() -> None:
    assert {name for name, family in FAMILIES.items() if family.experts is not None} == set(MOE_TYPES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_the_weights_are_those_of_the_model_with_its_shapes(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    checkpoint = Checkpoint.open(
        tiny_moe_checkpoint(tmp_path / "model", model_type, vocab=384, tied=tied, shards=2)
    )
    weights = checkpoint.family.names(checkpoint.config)
    assert weights.keys() == checkpoint.needed.keys()
    for name, placed in weights.items():
        shape = checkpoint.family.shape(checkpoint.config, placed.weight)
        assert shape == checkpoint.tensors[name].shape, name
    assert checkpoint.config["architectures"] == [checkpoint.family.architecture]
    checkpoint.check_shapes()


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_transformers_loads_it_with_nothing_missing_and_nothing_left(tmp_path: Path, model_type: str) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, dtype=torch.bfloat16)
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("options", [{"q_lora_rank": 32}, {"q_lora_rank": None}])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_known_with_and_without_latent_queries(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type, **options))
    assert checkpoint.family.names(checkpoint.config).keys() == checkpoint.needed.keys()
    checkpoint.check_shapes()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
        ("phimoe", {"lm_head_bias": False, "attention_bias": False}),
        ("qwen2_moe", {"qkv_bias": False, "decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
        ("olmoe", {"attention_bias": True, "num_key_value_heads": 2}),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_num_shared_experts": 0}),
        ("ernie4_5_moe", {"moe_layer_interval": 2}),
    ],
)
def test_what_a_config_may_say_otherwise_changes_the_weights_with_it(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type, **options))
    assert checkpoint.family.names(checkpoint.config).keys() == checkpoint.needed.keys()
    checkpoint.check_shapes()


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_the_blocks_are_the_experts_in_order_and_then_the_shared_one(tmp_path: Path, model_type: str) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type))
    assert [checkpoint.is_sparse(layer) for layer in range(3)] == [model_type not in DENSE_FIRST, True, True]
    blocks = checkpoint.blocks(2)
    shared = ["shared"] if model_type in SHARED else []
    assert [block.label for block in blocks] == [f"experts.{expert}" for expert in range(8)] + shared
    for block in blocks:
        width = SHARED[model_type] if block.shared else 96
        assert block.width(checkpoint.config) == width
        assert [checkpoint.tensors[name].shape for name in block.names] == [
            (width, 64),
            (width, 64),
            (64, width),
        ]
    experts = checkpoint.experts
    assert experts is not None
    module = checkpoint.empty_model().get_submodule(f"model.layers.2.{experts.module}")
    assert tuple(module.experts.gate_up_proj.shape) == (8, 192, 64)  # type: ignore[union-attr]
    if experts.shared is not None:
        layer = checkpoint.empty_model().get_submodule("model.layers.2")
        for role in FEED_FORWARD:
            assert layer.get_submodule(blocks[-1].linear(role)) is not None
            assert blocks[-1].linear(role).startswith(f"{experts.module}.{experts.shared.module}.")
        if experts.shared.gate is not None:
            assert module.get_submodule(experts.shared.gate).weight.shape == (1, 64)


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_every_linear_layer_that_reads_an_input_stands_once_in_the_order_of_computing(
    tmp_path: Path, model_type: str
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type, layers=2))
    groups = checkpoint.shared_inputs(1)
    layer = checkpoint.empty_model().get_submodule("model.layers.1")
    seen = [path for group in groups for path in group]
    linear = [name for name, module in layer.named_modules() if type(module) is torch.nn.Linear]
    assert sorted(seen) == sorted(name for name in linear if not re.search(r"gate$|\.wg$|router$", name))
    for group in groups:
        assert len({layer.get_submodule(path).in_features for path in group}) == 1


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_the_gguf_names_are_llama_cpp_s(tmp_path: Path, model_type: str) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type))
    family = checkpoint.family
    number = next(
        (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_architecture), None
    )
    if number is None:
        pytest.skip("llama.cpp has no such architecture")
    names = gguf.get_tensor_name_map(number, 3)
    for name, placed in named_weights(family, checkpoint.config).items():
        asked = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        for ours, theirs in NAMED_OTHERWISE.items():
            asked = asked.replace(ours, theirs)
        assert names.get_name(asked, try_suffixes=(".weight", ".bias")) == placed.gguf


@pytest.mark.parametrize(
    "model_type",
    [name for name, family in FAMILIES.items() if family.gguf_architecture and family.gguf_rules.reads_back],
)
def test_a_gguf_s_family_is_found_by_its_tensors_where_architectures_are_shared(model_type: str) -> None:
    family = FAMILIES[model_type]
    config = {
        "num_hidden_layers": 3,
        "num_experts": 2,
        "num_local_experts": 2,
        "n_routed_experts": 2,
        "moe_num_experts": 2,
    }
    stored = {
        placed.gguf
        for placed in named_weights(
            family, config | {"n_shared_experts": 1, "first_k_dense_replace": 1}
        ).values()
    }
    assert family_of_architecture(family.gguf_architecture, "model.gguf", stored) is family


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gpt_oss", "MXFP4"), ("granitemoe", "one tensor"), ("granitemoeshared", "one tensor")],
)
def test_families_whose_experts_are_one_tensor_are_refused_with_the_reason(
    model_type: str, reason: str
) -> None:
    with pytest.raises(CameraError, match=f"{model_type} is not supported: .*{reason}"):
        family_of({"model_type": model_type})


def test_a_quantised_checkpoint_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "deepseek_v3")
    changed(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(
        CameraError, match=r"quantization_config \(fp8\).*Dequantise the checkpoint to bfloat16"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("ernie4_5_moe", {"use_bias": True}, "biases"),
        ("hunyuan_v1_moe", {"moe_topk": [3, 3, 2]}, "moe_topk differs from layer to layer"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [96, 96, 64]}, "moe_intermediate_size differs"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [64, 64, 64]}, "gives every expert 96 channels"),
        ("hunyuan_v1_moe", {"num_shared_expert": [2, 2, 2]}, "num_shared_expert is 2"),
    ],
)
def test_a_model_that_transformers_would_build_otherwise_is_refused(
    tmp_path: Path, model_type: str, keys: dict[str, Any], reason: str
) -> None:
    folder = changed(tiny_moe_checkpoint(tmp_path / "model", model_type), **keys)
    with pytest.raises(CameraError, match=reason):
        Checkpoint.open(folder)


def test_numbers_for_every_layer_are_one_number_if_they_are_all_alike(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "hunyuan_v1_moe")
    changed(folder, moe_topk=[3, 3, 3], moe_intermediate_size=[96, 96, 96], num_shared_expert=[1, 1, 1])
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    assert checkpoint.family.experts is not None
    assert checkpoint.family.experts.chosen(checkpoint.config) == 3


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts for a token, and there are 8"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "0 experts for a token"),
        (
            "qwen3_moe",
            {"num_experts_per_tok": "three"},
            "num_experts_per_tok is 'three', not one whole number",
        ),
        ("qwen3_moe", {"num_experts": 10**12}, "num_experts is 1000000000000"),
        ("qwen3_moe", {"num_experts": -8}, "num_experts is '?-8"),
        ("qwen3_moe", {"num_experts": "8"}, "num_experts is '8'"),
        ("qwen3_moe", {"num_experts": [8, 8, 4]}, "num_experts is"),
        ("qwen3_moe", {"mlp_only_layers": 0.5}, "mlp_only_layers is '0.5', not a list of layers"),
        ("qwen3_moe", {"decoder_sparse_step": "two"}, "decoder_sparse_step is 'two'"),
        ("deepseek_v2", {"first_k_dense_replace": "one"}, "first_k_dense_replace is 'one'"),
        ("deepseek_v2", {"n_shared_experts": -1}, "n_shared_experts is '-1'"),
        ("deepseek_v3", {"n_group": 3}, "8 experts cannot be in 3 groups"),
        ("deepseek_v3", {"n_group": 0}, "8 experts cannot be in 0 groups"),
        (
            "deepseek_v3",
            {"n_group": 8, "topk_group": 4},
            "8 experts in 8 groups, and the router needs 16 to choose 2",
        ),
        (
            "deepseek_v3",
            {"num_experts_per_tok": 5},
            "8 experts in 2 groups, and the router needs 10 to choose 5",
        ),
        ("ernie4_5_moe", {"moe_layer_interval": [1]}, "interval"),
        (
            "qwen2_moe",
            {"shared_expert_intermediate_size": "wide"},
            "shared_expert_intermediate_size is 'wide'",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_named(
    tmp_path: Path, model_type: str, keys: dict[str, Any], reason: str
) -> None:
    folder = changed(tiny_moe_checkpoint(tmp_path / "model", model_type), **keys)
    with pytest.raises(CameraError, match=reason):
        Checkpoint.open(folder).check_shapes()


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        (
            "qwen3_moe",
            {"num_experts": 6},
            r"mlp\.gate\.weight has shape \[8, 64\] and config.json asks for \[6, 64\]",
        ),
        (
            "qwen3_moe",
            {"num_experts": 9},
            r"mlp\.gate\.weight has shape \[8, 64\] and config.json asks for \[9, 64\]",
        ),
        ("qwen2_moe", {"moe_intermediate_size": 64}, r"experts\.0\.gate_proj\.weight has shape \[96, 64\]"),
        ("deepseek_v2", {"n_shared_experts": 3}, r"shared_experts\.gate_proj\.weight has shape \[192, 64\]"),
        ("deepseek_v2", {"first_k_dense_replace": 2}, r"layers\.1\.mlp\.gate_proj\.weight is missing"),
        ("deepseek_v3", {"kv_lora_rank": 64}, r"kv_a_proj_with_mqa\.weight has shape \[48, 64\]"),
    ],
)
def test_a_config_of_another_model_is_found_out(
    tmp_path: Path, model_type: str, keys: dict[str, Any], reason: str
) -> None:
    folder = changed(tiny_moe_checkpoint(tmp_path / "model", model_type), **keys)
    with pytest.raises(CameraError, match=reason):
        Checkpoint.open(folder).check_shapes()


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_an_expert_that_is_missing_is_named(tmp_path: Path, model_type: str) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, layers=2)
    checkpoint = Checkpoint.open(folder)
    lost = checkpoint.blocks(1)[5].up
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors if name != lost}
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CameraError, match=f"{re.escape(lost)} is missing"):
        Checkpoint.open(folder).check_shapes()


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe", "glm4_moe"])
def test_a_layer_that_predicts_further_tokens_is_no_layer_of_the_model(
    tmp_path: Path, model_type: str
) -> None:
    plain = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "plain", model_type))
    more = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "more", model_type, predicting=True))
    assert len(more.tensors) > len(plain.tensors)
    assert more.needed.keys() == plain.tensors.keys()
    assert more.layer_count == plain.layer_count
    more.check_shapes()


@pytest.mark.parametrize("model_type", ["deepseek_v2", "qwen3_moe"])
def test_a_layer_behind_the_last_that_no_key_announces_is_refused(tmp_path: Path, model_type: str) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, predicting=True)
    with pytest.raises(CameraError, match="asks for 3 layers only"):
        Checkpoint.open(folder).check_shapes()


def test_weights_in_8_bit_floats_are_refused_and_told_what_to_do(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CameraError, match=r"experts\.0\.up_proj\.weight is F8_E4M3.*dequantise .* to bfloat16"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("repeat", "expected"),
    [
        ([96, 96, 96], {"moe_intermediate_size": [64, 64, 64]}),
        (96, {"moe_intermediate_size": 64}),
        (None, {}),
    ],
)
def test_a_width_that_a_config_says_twice_changes_in_both_places(
    repeat: Any, expected: dict[str, Any]
) -> None:
    config = {"model_type": "hunyuan_v1_moe", "intermediate_size": 96, "moe_intermediate_size": repeat}
    family = family_of(config)
    assert family.restated(config, {"intermediate_size": 64}) == expected
    assert family.restated(config, {"num_experts": 4}) == {}


@pytest.mark.parametrize(
    ("model_type", "keys", "least"),
    [
        ("deepseek_v3", {}, 4),  # 2 groups, each scored by its two best
        ("deepseek_v3", {"num_experts_per_tok": 4}, 8),  # all from one of the groups
        ("deepseek_v3", {"n_group": 1}, 2),
        ("deepseek_v2", {}, 3),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, 8),
        ("glm4_moe", {}, 3),
        ("PanguProMoE", {"num_experts_per_tok": 4}, 4),
        ("mixtral", {}, 2),
    ],
)
def test_a_router_needs_so_many_experts_to_choose_from(
    tmp_path: Path, model_type: str, keys: dict[str, Any], least: int
) -> None:
    folder = changed(tiny_moe_checkpoint(tmp_path / "model", model_type), **keys)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.experts is not None
    assert checkpoint.experts.least(checkpoint.config) == least


def test_the_documents_name_every_family_and_every_refused_one() -> None:
    page = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    for model_type in (*FAMILIES, "gpt_oss", "granitemoe", "granitemoeshared"):
        assert f"`{model_type}`" in page, model_type
