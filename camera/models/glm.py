"""GLM. GLM-4-0414 (`glm4`): gate and up are one matrix, there are norms before and behind attention and feed-forward part, and
half of each head turns, in neighbouring pairs. GLM-4.5, 4.6 and 4.7 (`glm4_moe`): the first layers dense, a shared expert,
norms on query and key in the large ones.
"""

from functools import partial

from camera.models.experts import Experts, Shared, enough_to_choose, whole
from camera.models.family import FAMILIES, Family
from camera.models.gguf import SIGMOID, GgufRules, Stated
from camera.models.weight import When
from camera.models.weights import (
    FFN_NORM,
    HEAD_NORMS,
    attention_weights,
    decoder,
    dense_weights,
    expert_weights,
    fused_dense_weights,
    norm,
    only,
    post_norms,
)

_WIDTH = "moe_intermediate_size"

FAMILIES.register(
    "glm4",
    Family(
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        gguf_architecture="glm4",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(("query", "key", "value"), When("attention_bias", default=True))
            ),
            *post_norms("post_self_attn_layernorm", "post_mlp_layernorm"),
            FFN_NORM,
            *fused_dense_weights(),
        ),
        left_out=("head_dim",),
        gguf_rules=GgufRules(rotary_share=0.5),
    ),
)

FAMILIES.register(
    "glm4_moe",
    Family(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        gguf_architecture="glm4moe",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(("query", "key", "value"), When("attention_bias", default=False)),
                norms=only(HEAD_NORMS, when=When("use_qk_norm", default=False)),
            ),
            norm("ffn_norm", "post_attention_layernorm", "post_attention_norm"),
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH, shared="shared_experts", correction="gate.e_score_correction_bias"),
        ),
        experts=Experts(
            count_keys=("n_routed_experts", "num_local_experts"),
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=lambda config, layer: layer >= whole(config, "first_k_dense_replace", 1),
            shared=Shared("shared_experts", _WIDTH, ("n_shared_experts",)),
            groups=lambda config: whole(config, "n_group", 1),
            least_per_group=partial(enough_to_choose, scored=2),
        ),
        gguf_rules=GgufRules(
            stated=(
                Stated("expert_weights_scale", "routed_scaling_factor", 1.0),
                Stated("expert_weights_norm", "norm_topk_prob", default=True),
            ),
            constants={"expert_gating_func": SIGMOID},
            config={"num_nextn_predict_layers": 0},
            rotary_share=0.5,
            lead=("first_k_dense_replace", 1),
            groups=("n_group", "topk_group", 1),
        ),
        prediction_layers_key="num_nextn_predict_layers",
    ),
)
