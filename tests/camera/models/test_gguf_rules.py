"""What GGUF files of published models state, and what follows from it."""

from typing import Any

import pytest

from camera.errors import CameraError
from camera.models import FAMILIES
from camera.models.gguf import N, config_of, numbers

PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        {
            "expert_count": 64,
            "expert_used_count": 6,
            "expert_feed_forward_length": 1408,
            "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 2816,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": False,
            "expert_gating_func": 1,
            "leading_dense_block_count": 1,
            "attention.kv_lora_rank": 512,
            "attention.q_lora_rank": 0,
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        {
            "expert_count": 256,
            "expert_used_count": 8,
            "expert_group_count": 8,
            "expert_group_used_count": 4,
            "expert_feed_forward_length": 2048,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 2048,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "leading_dense_block_count": 3,
            "attention.kv_lora_rank": 512,
            "attention.q_lora_rank": 1536,
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        },
    ),
    "Qwen2-57B-A14B": (
        "qwen2_moe",
        {
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "norm_topk_prob": False,
        },
        {
            "expert_count": 64,
            "expert_used_count": 8,
            "expert_feed_forward_length": 2560,
            "expert_shared_feed_forward_length": 20480,
        },
    ),
    "ERNIE-4.5-21B-A3B": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
        {
            "expert_count": 64,
            "expert_used_count": 6,
            "expert_feed_forward_length": 1536,
            "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 3072,
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336},
        {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 14336},
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_stated_and_given_back(model: str) -> None:
    model_type, config, stated = PUBLISHED[model]
    family = FAMILIES[model_type]
    found = numbers(family.gguf_rules, family.experts, config)
    assert found == stated
    assert [type(value) for value in found.values()] == [type(stated[name]) for name in found]

    def read(name: str, kind: type[N], default: N | None = None) -> N:
        known = {
            **found,
            "rope.dimension_count": 64,
            "attention.head_count": 16,
            "feed_forward_length": 14336,
        }
        value = known.get(name, default)
        assert isinstance(value, kind), name
        return value

    back = config_of(family.gguf_rules, family.experts, read)
    expected = {
        **config,
        **family.gguf_rules.config,
    }  # V2 chooses alike by either method where there is one group
    assert {key: back[key] for key in expected} == expected
    assert family.gguf_rules.warnings(config) == []


def test_latent_numbers_that_cannot_be_are_refused() -> None:
    family = FAMILIES["deepseek_v2"]

    def read(name: str, kind: type[N], default: N | None = None) -> N:
        return kind(64) if name == "rope.dimension_count" else kind(1)

    with pytest.raises(CameraError, match=r"key_length_mla is 1, and 64 of it turn"):
        config_of(family.gguf_rules, family.experts, read)
