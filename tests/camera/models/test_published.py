"""Models of the published sizes: as many parameters as transformers builds, and as their names promise.

Sizes are as their config.json had them, written down from memory.
"""

from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from camera.models import family_of


def _dense(model_type: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    keys = (
        *(
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        ),
        "vocab_size",
    )
    return {"model_type": model_type, **dict(zip(keys, sizes, strict=True)), **more}


PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "DeepSeek-MoE-16B": (
        16.4,
        {
            "model_type": "deepseek",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "vocab_size": 102400,
        },
    ),
    "DeepSeek-V2-Lite": (
        15.7,
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "vocab_size": 102400,
        },
    ),
    "DeepSeek-V2": (
        235.7,
        {
            "model_type": "deepseek_v2",
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "vocab_size": 102400,
        },
    ),
    "DeepSeek-V3": (671.0, {"model_type": "deepseek_v3"}),
    "ERNIE-4.5-21B-A3B": (21.8, {"model_type": "ernie4_5_moe"}),
    "GLM-4.5-Air": (
        106.9,
        {
            "model_type": "glm4_moe",
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "vocab_size": 151552,
        },
    ),
    "Hunyuan-A13B": (
        80.4,
        {
            "model_type": "hunyuan_v1_moe",
            "hidden_size": 4096,
            "intermediate_size": 3072,
            "moe_intermediate_size": [3072] * 32,
            "num_shared_expert": [1] * 32,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_experts": 64,
            "moe_topk": [8] * 32,
            "vocab_size": 128167,
            "tie_word_embeddings": True,
        },
    ),
    "Mixtral-8x7B": (46.7, {"model_type": "mixtral", "num_local_experts": 8}),
    "OLMoE-1B-7B": (
        6.9,
        {"model_type": "olmoe", "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "Phi-3.5-MoE": (
        41.9,
        {
            "model_type": "phimoe",
            "num_local_experts": 16,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "Qwen2-57B-A14B": (
        57.4,
        {
            "model_type": "qwen2_moe",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "Qwen3-30B-A3B": (
        30.5,
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "openPangu-Pro-MoE-72B": (
        72.0,
        {
            "model_type": "PanguProMoE",
            "hidden_size": 5120,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1344,
            "shared_expert_intermediate_size": 5376,
            "vocab_size": 153600,
        },
    ),
    "Llama-3.2-1B": (
        1.2,
        _dense("llama", (2048, 8192, 16, 32, 8, 128256), head_dim=64, tie_word_embeddings=True),
    ),
    "Mistral-7B-v0.3": (7.2, _dense("mistral", (4096, 14336, 32, 32, 8, 32768))),
    "Mistral-Nemo-12B": (12.2, _dense("mistral", (5120, 14336, 40, 32, 8, 131072), head_dim=128)),
    "Qwen2.5-7B": (7.6, _dense("qwen2", (3584, 18944, 28, 28, 4, 152064))),
    "SmolLM3-3B": (3.1, _dense("smollm3", (2048, 11008, 36, 16, 4, 128256))),
    "Seed-OSS-36B": (36.2, _dense("seed_oss", (5120, 27648, 64, 80, 8, 155136))),
    "ERNIE-4.5-0.3B": (0.4, _dense("ernie4_5", (1024, 3072, 18, 16, 2, 103424))),
    "Granite-3.3-8B": (8.2, _dense("granite", (4096, 12800, 40, 32, 8, 49159), tie_word_embeddings=True)),
    "EXAONE-4.0-32B": (32.0, _dense("exaone4", (5120, 27392, 64, 40, 8, 102400))),
    "OLMo-2-7B": (7.3, _dense("olmo2", (4096, 11008, 32, 32, 32, 100352))),
    "Phi-4-mini": (3.8, _dense("phi3", (3072, 8192, 32, 24, 8, 200064), tie_word_embeddings=True)),
    "Phi-4": (14.7, _dense("phi3", (5120, 17920, 40, 40, 10, 100352))),
    "GLM-4-9B-0414": (9.4, _dense("glm4", (4096, 13696, 40, 32, 2, 151552))),
    "Gemma-2-2B": (2.6, _dense("gemma2", (2304, 9216, 26, 8, 4, 256000))),
    "Gemma-3-1B": (1.0, _dense("gemma3_text", (1152, 6912, 26, 4, 1, 262144))),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_family_counts_the_parameters_of_its_published_models(name: str) -> None:
    billions, values = PUBLISHED[name]
    family = family_of(values)
    family.register()
    hf_config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    config = {**hf_config.to_dict(), **values}
    total = sum(prod(family.shape(config, placed.weight)) for placed in family.names(config).values())
    tied = set(model.all_tied_weights_keys)
    assert total == sum(tensor.numel() for key, tensor in model.state_dict().items() if key not in tied)
    assert round(total / 1e9, 1) == billions
