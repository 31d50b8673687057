"""Mixtral (8x7B, 8x22B), and Phi-3.5-MoE, whose checkpoints name experts alike."""

from camera.models.experts import Experts
from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules
from camera.models.weight import ATTENTION, Weight, When
from camera.models.weights import (
    FFN_NORM,
    attention_weights,
    decoder,
    expert_weights,
    norm,
)

_EXPERT_WEIGHTS = expert_weights("intermediate_size", module="block_sparse_moe", names=("w1", "w3", "w2"))
_EXPERTS = Experts(
    count_keys=("num_local_experts", "num_experts"),
    chosen_keys=("num_experts_per_tok",),
    width_key="intermediate_size",
)

FAMILIES.register(
    "mixtral",
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        gguf_architecture="llama",
        weights=decoder(*attention_weights({}), FFN_NORM, *_EXPERT_WEIGHTS),
        experts=_EXPERTS,
        left_out=("rope_parameters",),
        permutes_rotary=True,
    ),
)

FAMILIES.register(
    "phimoe",
    Family(
        model_type="phimoe",
        architecture="PhimoeForCausalLM",  # as transformers names it; published ones say PhiMoEForCausalLM
        gguf_architecture="phimoe",
        gguf_rules=GgufRules(
            own_head=True,
            refuses=lambda config: (
                None
                if config.get("attention_bias") and config.get("lm_head_bias")
                else "it asks for the biases of attention and head (attention_bias, lm_head_bias)"
            ),
            differences=lambda config: [
                "llama.cpp weighs the two chosen experts by their softmax and norms without subtracting the mean, where "
                "Phi-3.5-MoE mixes sparsely and does subtract it: the logits differ"
            ],
        ),
        weights=decoder(
            *attention_weights(dict.fromkeys(ATTENTION, When("attention_bias", default=False))),
            norm("attention_norm", "input_layernorm", "attn_norm", kind="bias"),
            FFN_NORM,
            norm("ffn_norm", "post_attention_layernorm", "ffn_norm", kind="bias"),
            *_EXPERT_WEIGHTS,
            head=(
                Weight("model.norm.bias", "norm", ("hidden_size",), "output_norm.bias"),
                Weight(
                    "lm_head.bias",
                    "head",
                    ("vocab_size",),
                    "output.bias",
                    When("lm_head_bias", default=False),
                ),
            ),
        ),
        experts=_EXPERTS,
        left_out=("rope_parameters",),
    ),
)
